// What tests/server/cpp_client.py has the client do: `scenarios NAME key=value ...`. It prints what it found
// as lines "key value", and ends with 1 if anything was thrown.
#include <aqt_client/client.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <thread>

using namespace std::chrono_literals;
namespace ac = aqt_client;

namespace {

// What an input is a view of outlives it: a temporary is none, nor what has no elements in memory.
template <class... R>
constexpr bool kSendable = (std::is_constructible_v<ac::Input, std::string, ac::Shape, R> && ...);
static_assert(kSendable<std::vector<float>&, const std::vector<ac::Bf16>&, std::span<const bool>,
                        double (&)[3], std::array<std::uint8_t, 2>&>);
static_assert(kSendable<std::vector<std::string>&, std::vector<std::string_view>&,
                        const char* (&)[2], std::span<const std::string>>);
static_assert(!kSendable<std::vector<float>>);
static_assert(!kSendable<std::vector<std::string>>);
static_assert(!kSendable<std::vector<bool>&>);
static_assert(!kSendable<std::vector<char>&>);

std::map<std::string, std::string> given;

std::string read(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + file);
  return {std::istreambuf_iterator<char>(stream), {}};
}

template <class T> std::vector<T> read_elements(const std::string& name) {
  const std::string bytes = read(given.at("folder") + "/" + name);
  const auto count = bytes.size() / sizeof(T);
  std::vector<T> elements(count);
  std::memcpy(elements.data(), bytes.data(), bytes.size());
  return elements;
}

template <class T> void write(const std::string& name, std::span<const T> elements) {
  std::ofstream(given.at("folder") + "/" + name, std::ios::binary)
      .write(reinterpret_cast<const char*>(elements.data()),
             static_cast<std::streamsize>(elements.size_bytes()));
}

std::vector<std::string> addresses() {
  std::vector<std::string> all;
  std::istringstream stream(given.at("addresses"));
  for (std::string one; std::getline(stream, one, ',');) all.push_back(one);
  return all;
}

ac::Client connected() {
  ac::Options options;
  if (given.contains("token")) options.token = [] { return given.at("token"); };
  if (given.contains("attempts")) options.max_attempts = std::stoi(given.at("attempts"));
  if (given.contains("timeout")) options.timeout = std::chrono::milliseconds(std::stoi(given.at("timeout")));
  if (given.contains("ca")) {
    grpc::SslCredentialsOptions ssl{.pem_root_certs = read(given.at("ca")),
                                    .pem_private_key = "",
                                    .pem_cert_chain = ""};
    if (given.contains("key")) {
      ssl.pem_private_key = read(given.at("key"));
      ssl.pem_cert_chain = read(given.at("certificate"));
    }
    options.credentials = grpc::SslCredentials(ssl);
  }
  return ac::Client(addresses(), options);
}

// Prints what `call` fails with.
template <class Call> void fails(const std::string& name, Call call) {
  try {
    call();
    std::cout << name << " succeeded\n";
  } catch (const ac::Error& error) {
    std::cout << name << ' ' << ac::name_of(error.code()) << ' ' << error.retry_after() / 1ms << ' '
              << error.what() << '\n';
  } catch (const std::logic_error& error) {
    std::cout << name << ' ' << error.what() << '\n';
  }
}

ac::Shape shape_of(const std::string& text) {
  ac::Shape shape;
  std::istringstream stream(text);
  for (std::string size; std::getline(stream, size, 'x');) shape.push_back(std::stoll(size));
  return shape;
}

ac::Request linear(const std::vector<float>& x, std::string id) {
  return {.model = "linear", .inputs = {{"x", {1, std::ssize(x)}, x}}, .id = std::move(id)};
}

std::string bits_of(const ac::Output& output) {
  const auto bytes = std::as_bytes(output.as<float>());
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Calls `visit` with a null pointer of each type of elements.
template <class Visit> void for_each_type(Visit visit) {
  visit(static_cast<bool*>(nullptr));
  visit(static_cast<std::uint8_t*>(nullptr));
  visit(static_cast<std::uint16_t*>(nullptr));
  visit(static_cast<std::uint32_t*>(nullptr));
  visit(static_cast<std::uint64_t*>(nullptr));
  visit(static_cast<std::int8_t*>(nullptr));
  visit(static_cast<std::int16_t*>(nullptr));
  visit(static_cast<std::int32_t*>(nullptr));
  visit(static_cast<std::int64_t*>(nullptr));
  visit(static_cast<ac::Fp16*>(nullptr));
  visit(static_cast<ac::Bf16*>(nullptr));
  visit(static_cast<float*>(nullptr));
  visit(static_cast<double*>(nullptr));
}

// Sends the file of each datatype, and writes what came back as PREFIXdatatype.back.
void datatypes() {
  const auto client = connected();
  const ac::Shape shape = shape_of(given.at("shape"));
  std::vector<std::shared_ptr<void>> kept;
  ac::Request request{.model = "identity", .inputs = {}};
  for_each_type([&]<class T>(T*) {
    const std::string name(ac::name_of(ac::DatatypeOf<T>::value));
    if (!std::filesystem::exists(given.at("folder") + "/" + name)) return;
    // std::vector<bool> has no elements in memory.
    const auto bytes = read_elements<char>(name);
    const auto count = bytes.size() / sizeof(T);
    std::shared_ptr<T[]> elements(new T[count]);
    std::memcpy(static_cast<void*>(elements.get()), bytes.data(), bytes.size());
    request.inputs.emplace_back(name, shape, std::span<const T>(elements.get(), count));
    kept.push_back(std::move(elements));
  });
  std::optional<ac::Result> result = client.infer(request);
  const std::vector<ac::Output> outputs = result->outputs;
  result.reset();  // The outputs keep what they are views of.
  for_each_type([&]<class T>(T*) {
    for (const auto& output : outputs) {
      if (output.datatype() != ac::DatatypeOf<T>::value) continue;
      if (output.shape() != shape) throw std::runtime_error("another shape came back");
      write<T>(output.name() + ".back", output.as<T>());
    }
  });
  if (given.contains("only")) {
    request.outputs = {given.at("only")};
    for (const auto& output : client.infer(request).outputs) std::cout << "only " << output.name() << '\n';
  }
}

// Sends two BYTES of which one is no text, and prints what comes back.
void bytes() {
  const auto client = connected();
  const std::vector<std::string> texts{"größer", std::string("\0\xff", 2)};
  const auto result = client.infer({.model = "identity", .inputs = {{"b", {2}, texts}}});
  const auto found = result["b"].texts();
  std::cout << "same " << std::ranges::equal(found, texts) << '\n';
  fails("as_float", [&] { result["b"].as<float>(); });
  fails("absent", [&] { result["c"]; });
}

void told() {
  const auto client = connected();
  const auto x = read_elements<float>("x");
  ac::Request request = linear(x, "an id");
  request.version = "1";
  request.priority = 1;
  request.queue_timeout = 20s;
  request.parameters = {{"text", "t"}, {"half", 0.5}, {"less", std::int64_t{-1}}, {"yes", true}};
  const auto result = client.infer(request);
  std::cout << "answer " << result.model << ' ' << result.version << ' ' << result.id << '\n'
            << "exact " << (result.exact ? *result.exact ? "yes" : "no" : "unsaid") << '\n'
            << "parameters " << result.parameters.size() << '\n';
  write<float>("y", result.outputs.at(0).as<float>());
}

void asked() {
  const auto client = connected();
  std::cout << "live " << client.is_live() << "\nready " << client.is_ready() << "\nmodel_ready "
            << client.is_model_ready("linear") << client.is_model_ready("linear", "1") << '\n'
            << "server " << client.server_metadata().name << '\n';
  const auto metadata = client.model_metadata("linear");
  const auto& x = metadata.inputs.at(0);
  std::cout << "versions " << metadata.versions.at(0) << "\ninput " << x.name << ' ' << x.datatype
            << ' ' << x.shape.at(0) << ' ' << x.shape.at(1) << '\n';
  for (const auto& state : client.model_states("linear")) std::cout << "state " << state.state << '\n';
}

void errors() {
  const auto client = connected();
  const auto x = read_elements<float>("x");
  const std::vector<std::string> texts{"no", "numbers"};
  fails("unknown", [&] { client.infer({.model = "nope", .inputs = {}}); });
  fails("bytes", [&] { client.infer({.model = "linear", .inputs = {{"x", {1, 2}, texts}}}); });
  fails("priority", [&] {
    ac::Request request = linear(x, "");
    request.priority = 99;
    client.infer(request);
  });
  fails("deadline", [&] { client.infer(linear(x, ""), 1us); });
  fails("shape", [&] { ac::Input("x", {2, 2}, x); });
  fails("negative", [&] { ac::Input("x", {-1, 6}, x); });
  fails("timeout", [&] { client.infer(linear(x, ""), 0s); });
  fails("addresses", [&] { ac::Client({}); });
  fails("address", [&] { ac::Client({"127.0.0.1:1", "127.0.0.1"}); });
  fails("families", [&] { ac::Client({"127.0.0.1:1", "[::1]:1"}); });
  fails("large", [&] {
    const std::vector<float> much((256 << 20) / sizeof(float) + 1);
    client.infer({.model = "linear", .inputs = {{"x", {1, std::ssize(much)}, much}}});
  });
}

// One request, or what it fails with.
void once() {
  const auto client = connected();
  const auto x = read_elements<float>("x");
  fails("once", [&] { write<float>("y", client.infer(linear(x, "")).outputs.at(0).as<float>()); });
}

void stream() {
  const auto client = connected();
  const auto x = read_elements<float>("x");
  const std::string expected = read(given.at("folder") + "/expected");
  auto stream = client.stream();
  std::jthread sender([&] {
    stream.send(linear(x, "a"));
    stream.send({.model = "nope", .inputs = {}, .id = "b"});
    for (int i = 0; i < 200; ++i) stream.send(linear(x, "c" + std::to_string(i)));
    stream.finish();
  });
  int same = 0;
  std::string last;
  while (const auto answer = stream.next()) {
    last = answer->id;
    if (last == "b") fails("b", [&] { answer->result(); });
    else same += bits_of(answer->result()["y"]) == expected;
  }
  std::cout << "same " << same << "\nlast " << last << "\nover " << !stream.next() << '\n';
  {
    auto left = client.stream();
    for (int i = 0; i < 8; ++i) left.send(linear(x, ""));
    std::cout << "first " << left.next().has_value() << '\n';
  }
  auto late = client.stream(1us);
  fails("late", [&] { late.next(); });
  std::cout << "takes " << late.send(linear(x, "")) << '\n';
}

// Four threads ask until each has its share; says so when a part of it is answered.
void load() {
  const auto client = connected();
  const auto x = read_elements<float>("x");
  const std::string expected = read(given.at("folder") + "/expected");
  const int each = std::stoi(given.at("each"));
  std::atomic<int> answered = 0, wrong = 0;
  std::exception_ptr failed;
  std::mutex mutex;
  {
    std::vector<std::jthread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&] {
        try {
          for (int i = 0; i < each; ++i) {
            wrong += bits_of(client.infer(linear(x, ""))["y"]) != expected;
            if (++answered == each) std::cout << "begun" << std::endl;
          }
        } catch (...) {
          const std::scoped_lock lock(mutex);
          failed = std::current_exception();
        }
      });
    }
  }
  if (failed) std::rethrow_exception(failed);
  std::cout << "answered " << answered << "\nwrong " << wrong << '\n';
}

void turns() {
  const auto client = connected();
  for (int i = 0; i < std::stoi(given.at("calls")); ++i) client.is_live();
}

const std::map<std::string, void (*)()> kScenarios{
    {"datatypes", datatypes}, {"bytes", bytes},   {"told", told}, {"asked", asked}, {"errors", errors},
    {"once", once},           {"stream", stream}, {"load", load}, {"turns", turns},
};

}  // namespace

int main(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto equals = argument.find('=');
    given[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  try {
    kScenarios.at(argv[1])();
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
