// One connection: frames of HTTP/2 to gRPC calls and back, by libnghttp2. Knows no Python.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace door {

// What is bounded, for one connection or for all together.
struct Limits {
  // What can be called, by the paths of HTTP/2.
  std::unordered_set<std::string> paths;
  size_t message_bytes;
  // Of all connections: requests that are not whole or not taken, and responses not yet sent.
  size_t buffered_bytes;
  size_t connections;
  // Of all connections: calls that were taken and are not answered.
  size_t calls;
  uint32_t streams;
  size_t header_bytes;
  // Seconds without a call after which a connection is closed.
  double idle_s;
};

// A unary call whose body, a message with its prefix, is whole. `headers` are name\0value\0...
struct Request {
  uint64_t call;
  std::string path, headers, peer, encoding, body;
  // From its begin until it has to be answered, or negative for any time.
  double timeout_s;
  // When its headers came.
  double began_s;
};

// `body`, a message with its prefix, is sent if `status` is 0; `trailers` are as `headers` above.
struct Response {
  uint64_t call;
  int status;
  std::string sentence, trailers, body;
};

// What a connection tells, and what it shares with the others. All in the thread of the door.
class Calls {
 public:
  virtual ~Calls() = default;
  // Hands a request over; returns whether there was room.
  virtual bool made(Request&& request, class Connection& by, int32_t stream) = 0;
  // Nobody waits for the answer any more.
  virtual void gone(uint64_t call) = 0;
  // Takes room for `bytes` more; returns whether there was that much.
  virtual bool take_room(size_t bytes) = 0;
  virtual void give_room(size_t bytes) = 0;
  virtual uint64_t next_call() = 0;
};

class Connection {
 public:
  Connection(int descriptor, std::string peer, const Limits& limits, Calls& calls);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Reads what there is and writes what follows; false: it is over.
  bool read();
  // Writes as much as the socket takes; false: it is over.
  bool write();
  // Whether more is to be written than the socket took.
  bool writing() const { return sent_ < out_.size() || nghttp2_session_want_write(session_); }
  void answer(int32_t stream, Response&& response);
  // Takes no more streams; those that are open are answered.
  void drain();
  bool idle() const { return streams_.empty() && !writing(); }
  // To be called every second or so: false if the other side is gone, too slow, or has no calls.
  bool alive(double now);
  int descriptor() const { return descriptor_; }

  // Whether the thread waits until the socket takes more.
  bool watched = false;

 private:
  struct Stream;
  static nghttp2_session_callbacks* callbacks();
  Stream* stream(int32_t number);
  void header(Stream& stream, std::string_view name, std::string_view value);
  void headed(Stream& stream);
  void data(Stream& stream, const uint8_t* bytes, size_t size);
  void whole(Stream& stream);
  void refuse(Stream& stream, int status, const std::string& sentence);
  void http_error(Stream& stream, const char* code);
  void finish(Stream& stream);
  void closed(int32_t number);
  bool reset_too_often();

  const int descriptor_;
  const std::string peer_;
  const Limits& limits_;
  Calls& calls_;
  nghttp2_session* session_ = nullptr;
  std::unordered_map<int32_t, std::unique_ptr<Stream>> streams_;
  std::string out_;
  size_t sent_ = 0;
  // When the other side was heard, took something, and had a call; and since when resets count.
  double heard_s_, written_s_, called_s_, resets_since_s_;
  double resets_ = 0;
  bool greeted_ = false, pinged_ = false, draining_ = false;
};

double now_s();

}  // namespace door
