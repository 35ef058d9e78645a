// A client of aqt-server, and of any other server of the Open Inference Protocol, over gRPC.
#pragma once

#include <grpcpp/security/credentials.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "aqt_client/error.h"
#include "aqt_client/messages.h"
#include "aqt_client/tensor.h"

namespace aqt_client {

struct Connection;

struct Options {
  // What a call has for all of its attempts together.
  Duration timeout = std::chrono::seconds(30);
  // How often a call is tried while the server is away or overloaded. Before attempt n+1 it waits a
  // random time below 0.1 s * 2^(n-1), at most 2 s, after what the server says.
  int max_attempts = 5;
  // Null: the connection is not encrypted. grpc::SslCredentials makes them.
  std::shared_ptr<grpc::ChannelCredentials> credentials = nullptr;
  // Who calls, asked before each attempt. Do not send one unencrypted beyond your own machine.
  std::function<std::string()> token = nullptr;
};

// The answer to one request of a stream: its result, or what it failed with.
struct StreamAnswer {
  std::string id;
  std::variant<Result, Error> outcome;

  // The result; throws what the request failed with.
  const Result& result() const;
};

// Many requests over one stream, answered in their order; one that fails ends no other.
//
// One thread may send while another reads. The server takes some 64 requests before their answers
// are read, and then `send` waits: who sends more than that at once has to read in another thread.
// It keeps the connection of its client.
class Stream {
 public:
  Stream(Stream&&) noexcept;
  // What is not answered yet is cancelled.
  ~Stream();

  // Returns whether the stream still takes requests: if not, `next` says how it ended. Throws
  // std::invalid_argument if the request cannot be sent.
  bool send(const Request& request);
  // No more requests are sent.
  void finish();
  // Waits for the next answer; nothing after the last one. Throws Error if the stream itself fails.
  std::optional<StreamAnswer> next();

 private:
  friend class Client;
  struct State;
  explicit Stream(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// A connection, which many threads may use at once. Nothing is connected before the first call.
//
// Every call throws Error if the server refuses it or does not answer in time. While the server is
// unavailable or overloaded the call is made again, within its time.
class Client {
 public:
  // `addresses` is one "host:port"; or several, which take calls in turn; or one
  // "dns:///host:port", which stands for all that the name resolves to. Of several, one that is
  // down, loading or stopping is left out, and calls that it had go to another; their IPs are looked
  // up once, and their certificates must have the name of the first.
  //
  // Throws std::invalid_argument if there is none, or one of several has no IP.
  explicit Client(const std::vector<std::string>& addresses, Options options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // The answer to `request`; `timeout` is instead of the client's. Throws std::invalid_argument if
  // it cannot be sent.
  Result infer(const Request& request, std::optional<Duration> timeout = {}) const;
  // A stream with no end to its time, unless `timeout` is one.
  Stream stream(std::optional<Duration> timeout = {}) const;

  // Whether the server runs. One that cannot be reached is an error, and not a no.
  bool is_live() const;
  // Whether the server takes requests of inference.
  bool is_ready() const;
  // Whether the model does. No version: the one that would answer.
  bool is_model_ready(const std::string& name, const std::string& version = "") const;
  ServerMetadata server_metadata() const;
  ModelMetadata model_metadata(const std::string& name, const std::string& version = "") const;
  // Each version of the model, where it is in its life, and why.
  std::vector<ModelState> model_states(const std::string& name) const;

 private:
  std::shared_ptr<const Connection> connection_;
};

}  // namespace aqt_client
