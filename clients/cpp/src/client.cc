#include "aqt_client/client.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "open_inference.grpc.pb.h"
#include "wire.h"

namespace aqt_client {

namespace {

using Clock = std::chrono::steady_clock;
using inference::GRPCInferenceService;

constexpr Duration kFirstBackoff = std::chrono::milliseconds(100);
constexpr Duration kMaxBackoff = std::chrono::seconds(2);

// Random, so that many clients do not come back at the same moment.
Duration backoff(int attempt) {
  thread_local std::minstd_rand random{std::random_device{}()};
  const Duration longest = std::min(kMaxBackoff, kFirstBackoff * (1 << std::min(attempt - 1, 5)));
  return Duration(std::uniform_int_distribution<Duration::rep>(0, longest.count())(random));
}

// gRPC has deadlines by the clock of the wall; what is over is so at once.
std::chrono::system_clock::time_point in(Duration time) {
  return std::chrono::system_clock::now() +
         std::chrono::duration_cast<std::chrono::system_clock::duration>(time);
}

std::string seconds(Duration time) {
  std::string text = std::to_string(std::chrono::duration<double>(time).count());
  text.erase(text.find_last_not_of('0') + 1);
  return text.ends_with('.') ? text.substr(0, text.size() - 1) : text;
}

Duration checked(Duration timeout) {
  if (timeout <= Duration::zero()) throw std::invalid_argument("`timeout` has to be positive");
  return timeout;
}

}  // namespace

// What a client is, and what its streams keep.
struct Connection {
  Options options;
  std::unique_ptr<GRPCInferenceService::Stub> stub;

  // The response to `request`, of the method whose stub is `method`, within `timeout`.
  template <class Message, class Response>
  void call(grpc::Status (GRPCInferenceService::Stub::*method)(grpc::ClientContext*, const Message&,
                                                               Response*),
            const Message& request, Response& response, Duration timeout) const {
    const auto end = Clock::now() + timeout;
    std::optional<Error> last;
    for (int attempt = 1;; ++attempt) {
      grpc::ClientContext context;
      prepare(context, end - Clock::now());
      const grpc::Status status = (stub.get()->*method)(&context, request, &response);
      if (status.ok()) return;
      if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) {
        last = error_of(status);
      } else if (!last) {
        throw Error("no answer within " + seconds(timeout) + " s: " + error_of(status).what(),
                    status.error_code(), error_of(status).retry_after());
      } else {
        throw *last;  // An attempt that is cut off says nothing of the cause, and this one did.
      }
      const Duration wait = last->retry_after() + backoff(attempt);
      if (!last->temporary() || attempt >= options.max_attempts || Clock::now() + wait >= end) {
        throw *last;
      }
      std::this_thread::sleep_for(wait);
    }
  }

  template <class Message, class Response>
  Response ask(grpc::Status (GRPCInferenceService::Stub::*method)(grpc::ClientContext*,
                                                                  const Message&, Response*),
               const Message& request) const {
    Response response;
    call(method, request, response, options.timeout);
    return response;
  }

  void prepare(grpc::ClientContext& context, std::optional<Duration> timeout) const {
    if (timeout) context.set_deadline(in(*timeout));
    if (options.token) context.AddMetadata("authorization", "Bearer " + options.token());
  }
};

Client::Client(const std::vector<std::string>& addresses, Options options) {
  checked(options.timeout);
  if (options.max_attempts < 1) throw std::invalid_argument("`max_attempts` has to be at least 1");
  const Target target = target_of(addresses);
  const auto credentials =
      options.credentials ? options.credentials : grpc::InsecureChannelCredentials();
  auto channel = grpc::CreateCustomChannel(target.name, credentials, target.arguments);
  connection_ = std::make_shared<const Connection>(
      Connection{std::move(options), GRPCInferenceService::NewStub(std::move(channel))});
}

Client::~Client() = default;

Result Client::infer(const Request& request, std::optional<Duration> timeout) const {
  auto response = std::make_shared<inference::ModelInferResponse>();
  connection_->call(&GRPCInferenceService::Stub::ModelInfer, encode(request), *response,
               checked(timeout.value_or(connection_->options.timeout)));
  return decode(std::move(response));
}

bool Client::is_live() const {
  const inference::ServerLiveRequest request;
  return connection_->ask(&GRPCInferenceService::Stub::ServerLive, request).live();
}

bool Client::is_ready() const {
  const inference::ServerReadyRequest request;
  return connection_->ask(&GRPCInferenceService::Stub::ServerReady, request).ready();
}

bool Client::is_model_ready(const std::string& name, const std::string& version) const {
  inference::ModelReadyRequest request;
  request.set_name(name);
  request.set_version(version);
  return connection_->ask(&GRPCInferenceService::Stub::ModelReady, request).ready();
}

ServerMetadata Client::server_metadata() const {
  const inference::ServerMetadataRequest request;
  const auto found = connection_->ask(&GRPCInferenceService::Stub::ServerMetadata, request);
  return {.name = found.name(),
          .version = found.version(),
          .extensions = {found.extensions().begin(), found.extensions().end()}};
}

ModelMetadata Client::model_metadata(const std::string& name, const std::string& version) const {
  inference::ModelMetadataRequest request;
  request.set_name(name);
  request.set_version(version);
  return metadata_of(connection_->ask(&GRPCInferenceService::Stub::ModelMetadata, request));
}

std::vector<ModelState> Client::model_states(const std::string& name) const {
  const inference::RepositoryIndexRequest request;
  std::vector<ModelState> states;
  const auto index = connection_->ask(&GRPCInferenceService::Stub::RepositoryIndex, request);
  for (const auto& model : index.models()) {
    if (model.name() == name) states.push_back({model.version(), model.state(), model.reason()});
  }
  return states;
}

// In the order in which they go: the call before its context, and both before the connection.
struct Stream::State {
  std::shared_ptr<const Connection> connection;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<inference::ModelInferRequest,
                                           inference::ModelStreamInferResponse>>
      call;
  bool over = false;

  ~State() {
    if (!call) return;
    context.TryCancel();
    inference::ModelStreamInferResponse unread;
    while (!over && call->Read(&unread)) {
    }
    if (!over) call->Finish();
  }
};

Stream::Stream(std::unique_ptr<State> state) : state_(std::move(state)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream::~Stream() = default;

Stream Client::stream(std::optional<Duration> timeout) const {
  auto state = std::make_unique<Stream::State>();
  state->connection = connection_;
  if (timeout) checked(*timeout);
  connection_->prepare(state->context, timeout);
  state->call = connection_->stub->ModelStreamInfer(&state->context);
  return Stream(std::move(state));
}

bool Stream::send(const Request& request) { return state_->call->Write(encode(request)); }

void Stream::finish() { state_->call->WritesDone(); }

std::optional<StreamAnswer> Stream::next() {
  if (state_->over) return {};
  inference::ModelStreamInferResponse message;
  if (!state_->call->Read(&message)) {
    state_->over = true;
    const grpc::Status status = state_->call->Finish();
    if (!status.ok()) throw error_of(status);
    return {};
  }
  auto response = std::make_shared<inference::ModelInferResponse>();
  response->Swap(message.mutable_infer_response());
  std::string id = response->id();
  if (message.error_message().empty()) return StreamAnswer{id, decode(std::move(response))};
  return StreamAnswer{id, error_of(message.error_message(), *response)};
}

const Result& StreamAnswer::result() const {
  if (const Error* error = std::get_if<Error>(&outcome)) throw *error;
  return std::get<Result>(outcome);
}

}  // namespace aqt_client
