#include "connection.h"

#include "grpc.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <string_view>
#include <vector>

namespace door {
namespace {

constexpr size_t kReadBytes = 1 << 18;
constexpr size_t kWriteBytes = 1 << 18;
constexpr int32_t kStreamWindow = 1 << 20;
constexpr int32_t kConnectionWindow = 1 << 24;
constexpr uint32_t kFrameBytes = 1 << 20;
constexpr double kGreetingS = 10, kSilentS = 60, kPongS = 20, kStuckS = 60;
// As libnghttp2 has it from 1.57 on: who resets more streams than that is flooding.
constexpr double kResets = 1000, kResetsPerS = 33;

enum Status { kOk = 0, kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12 };

nghttp2_nv pair(std::string_view name, std::string_view value) {
  return {(uint8_t*)name.data(), (uint8_t*)value.data(), name.size(), value.size(),
          NGHTTP2_NV_FLAG_NONE};
}

}  // namespace

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Connection::Stream {
  int32_t number;
  uint64_t call = 0;  // 0: not handed over
  std::string path, headers, encoding, body;
  size_t header_bytes = 0, room = 0, sent = 0;
  double timeout_s = -1, began_s = 0;
  bool post = false, grpc = false, bad_timeout = false, ended = false, answered = false;
  Response response{};
};

Connection::Connection(int descriptor, std::string peer, const Limits& limits, Calls& calls)
    : descriptor_(descriptor), peer_(std::move(peer)), limits_(limits), calls_(calls) {
  heard_s_ = written_s_ = called_s_ = resets_since_s_ = now_s();
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option)) throw std::bad_alloc();
  nghttp2_option_set_no_closed_streams(option, 1);
  const int failed = nghttp2_session_server_new2(&session_, callbacks(), this, option);
  nghttp2_option_del(option);
  if (failed) throw std::bad_alloc();
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits_.streams},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, static_cast<uint32_t>(kStreamWindow)},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, kFrameBytes},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(limits_.header_bytes)},
  };
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, std::size(settings));
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Connection::~Connection() {
  while (!streams_.empty()) closed(streams_.begin()->first);
  nghttp2_session_del(session_);
  ::close(descriptor_);
}

bool Connection::read() {
  static thread_local std::vector<uint8_t> buffer(kReadBytes);
  const ssize_t count = ::recv(descriptor_, buffer.data(), buffer.size(), 0);
  if (count == 0) return false;
  if (count < 0) return errno == EAGAIN || errno == EINTR;
  heard_s_ = now_s();
  pinged_ = false;
  // What is wrong for HTTP/2 makes libnghttp2 queue a GOAWAY, or fail where it cannot go on.
  if (nghttp2_session_mem_recv(session_, buffer.data(), count) != count) return false;
  return nghttp2_session_want_read(session_) || nghttp2_session_want_write(session_);
}

bool Connection::write() {
  for (;;) {
    if (sent_ == out_.size()) {
      out_.clear();
      sent_ = 0;
      while (out_.size() < kWriteBytes) {
        const uint8_t* bytes;
        const ssize_t count = nghttp2_session_mem_send(session_, &bytes);
        if (count < 0) return false;
        if (count == 0) break;
        out_.append(reinterpret_cast<const char*>(bytes), count);
      }
      if (out_.empty()) {
        written_s_ = now_s();
        return nghttp2_session_want_read(session_);
      }
    }
    const ssize_t count =
        ::send(descriptor_, out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL);
    if (count < 0) return errno == EAGAIN || errno == EINTR;
    written_s_ = now_s();
    sent_ += count;
  }
}

void Connection::answer(int32_t number, Response&& response) {
  if (Stream* found = stream(number); found && !found->answered) {
    // An answer is there already: that it is held counts, and does not make it fail.
    calls_.take_room(response.body.size());
    found->room += response.body.size();
    found->response = std::move(response);
    finish(*found);
  }
}

void Connection::drain() {
  draining_ = true;
  const int32_t last = nghttp2_session_get_last_proc_stream_id(session_);
  nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, last, NGHTTP2_NO_ERROR, nullptr, 0);
}

bool Connection::alive(double now) {
  if (!greeted_ && now - called_s_ > kGreetingS) return false;
  if (writing() && now - written_s_ > kStuckS) return false;
  if (!streams_.empty()) {
    called_s_ = now;
  } else if (now - called_s_ > limits_.idle_s) {
    // Told first, so that a call that is on its way is sent again elsewhere.
    if (draining_) return false;
    drain();
  }
  if (pinged_) return now - heard_s_ < kSilentS + kPongS;
  if (now - heard_s_ > kSilentS) {
    pinged_ = true;
    nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr);
  }
  return true;
}

Connection::Stream* Connection::stream(int32_t number) {
  auto found = streams_.find(number);
  return found == streams_.end() ? nullptr : found->second.get();
}

void Connection::header(Stream& stream, std::string_view name, std::string_view value) {
  stream.header_bytes += name.size() + value.size() + 32;
  if (stream.answered || stream.header_bytes > limits_.header_bytes) return;
  if (name == ":path") {
    stream.path = value;
  } else if (name == ":method") {
    stream.post = value == "POST";
  } else if (name == "content-type") {
    stream.grpc = value.substr(0, 16) == "application/grpc";
  } else if (name == "grpc-timeout") {
    stream.timeout_s = timeout_of(value);
    stream.bad_timeout = stream.timeout_s < 0;
  } else if (name == "grpc-encoding") {
    stream.encoding = value;
  } else if (name[0] != ':' && name != "te" && name != "grpc-accept-encoding") {
    stream.headers.append(name).push_back('\0');
    stream.headers.append(value).push_back('\0');
  }
}

void Connection::headed(Stream& stream) {
  if (stream.answered) return;
  if (stream.header_bytes > limits_.header_bytes) {
    return refuse(stream, kResourceExhausted,
                  "the call has more bytes of headers than the " +
                      std::to_string(limits_.header_bytes) + " that the server takes");
  }
  if (!stream.post) return http_error(stream, "405");
  if (!stream.grpc) return http_error(stream, "415");
  // Before its message: that of a stream may never end.
  if (!limits_.paths.count(stream.path)) {
    return refuse(stream, kUnimplemented,
                  "this port has no " + stream.path + ": it has unary calls, and --port has all");
  }
  if (stream.bad_timeout) {
    refuse(stream, kInvalidArgument, "grpc-timeout is up to 8 digits and a unit");
  }
}

void Connection::data(Stream& stream, const uint8_t* bytes, size_t size) {
  if (stream.answered) return;
  stream.room += size;
  if (!calls_.take_room(size)) {
    return refuse(stream, kResourceExhausted,
                  "the server holds as many bytes of requests as it may: send it again later");
  }
  stream.body.append(reinterpret_cast<const char*>(bytes), size);
  if (stream.body.size() < kPrefix) return;
  const size_t length = length_of(stream.body);
  if (length > limits_.message_bytes) {
    return refuse(stream, kResourceExhausted,
                  // In gRPC's words, by which clients tell it from a server that is overloaded.
                  "Received message larger than max (" + std::to_string(length) + " vs. " +
                      std::to_string(limits_.message_bytes) +
                      "): split the request, or raise --max-message-bytes");
  }
  if (stream.body.size() > kPrefix + length) {
    refuse(stream, kInvalidArgument, "a unary call has one message, and there are more bytes");
  }
}

void Connection::whole(Stream& stream) {
  stream.ended = true;
  if (stream.answered) return;
  const size_t size = stream.body.size();
  if (size < kPrefix || size - kPrefix != length_of(stream.body) || stream.body[0] & ~1) {
    return refuse(stream, kInvalidArgument, "the call ended before its message did");
  }
  Request request{};
  request.call = calls_.next_call();
  request.path = std::move(stream.path);
  request.headers = std::move(stream.headers);
  request.encoding = std::move(stream.encoding);
  request.peer = peer_;
  request.timeout_s = stream.timeout_s;
  request.began_s = stream.began_s;
  request.body = std::move(stream.body);
  const uint64_t call = request.call;
  // What was taken for it goes on with it, and is given back by whoever takes it.
  stream.room -= size;
  if (!calls_.made(std::move(request), *this, stream.number)) {
    calls_.give_room(size);
    return refuse(stream, kResourceExhausted,
                  "the server has as many calls as it may: send it again later");
  }
  stream.call = call;
}

void Connection::refuse(Stream& stream, int status, const std::string& sentence) {
  stream.response.status = status;
  stream.response.sentence = sentence;
  finish(stream);
}

void Connection::http_error(Stream& stream, const char* code) {
  stream.answered = true;
  const nghttp2_nv headers[] = {pair(":status", code)};
  nghttp2_submit_response(session_, stream.number, headers, std::size(headers), nullptr);
}

void Connection::finish(Stream& stream) {
  stream.answered = true;
  Response& response = stream.response;
  const std::string status = std::to_string(response.status);
  const std::string sentence = percent_encoded(response.sentence);
  std::vector<nghttp2_nv> last{pair("grpc-status", status)};
  if (!sentence.empty()) last.push_back(pair("grpc-message", sentence));
  for (size_t at = 0; at < response.trailers.size();) {
    const char* name = response.trailers.c_str() + at;
    const char* value = name + std::strlen(name) + 1;
    last.push_back(pair(name, value));
    at = value + std::strlen(value) + 1 - response.trailers.c_str();
  }
  std::vector<nghttp2_nv> first{pair(":status", "200"), pair("content-type", "application/grpc")};
  if (response.status != kOk) {
    first.insert(first.end(), last.begin(), last.end());
    nghttp2_submit_response(session_, stream.number, first.data(), first.size(), nullptr);
    return;
  }
  nghttp2_data_provider body{};
  body.source.ptr = &stream;
  body.read_callback = [](nghttp2_session* session, int32_t number, uint8_t* to, size_t size,
                          uint32_t* flags, nghttp2_data_source* source, void*) -> ssize_t {
    auto& stream = *static_cast<Stream*>(source->ptr);
    const std::string& message = stream.response.body;
    size = std::min(size, message.size() - stream.sent);
    std::memcpy(to, message.data() + stream.sent, size);
    stream.sent += size;
    if (stream.sent == message.size()) {
      *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
      const nghttp2_nv ok[] = {pair("grpc-status", "0")};
      nghttp2_submit_trailer(session, number, ok, std::size(ok));
    }
    return static_cast<ssize_t>(size);
  };
  nghttp2_submit_response(session_, stream.number, first.data(), first.size(), &body);
}

void Connection::closed(int32_t number) {
  auto found = streams_.find(number);
  if (found == streams_.end()) return;
  Stream& stream = *found->second;
  calls_.give_room(stream.room);
  if (stream.call && !stream.answered) calls_.gone(stream.call);
  streams_.erase(found);
}

bool Connection::reset_too_often() {
  const double now = now_s();
  resets_ = std::max(0.0, resets_ - (now - resets_since_s_) * kResetsPerS) + 1;
  resets_since_s_ = now;
  return resets_ > kResets;
}

nghttp2_session_callbacks* Connection::callbacks() {
  // Made once and never deleted, as every connection needs them.
  static nghttp2_session_callbacks* made = [] {
    nghttp2_session_callbacks* callbacks = nullptr;
    if (nghttp2_session_callbacks_new(&callbacks)) throw std::bad_alloc();
    nghttp2_session_callbacks_set_on_begin_headers_callback(
        callbacks, [](nghttp2_session*, const nghttp2_frame* frame, void* self) {
          auto& connection = *static_cast<Connection*>(self);
          if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
            auto stream = std::make_unique<Stream>();
            stream->number = frame->hd.stream_id;
            stream->began_s = now_s();
            connection.streams_[frame->hd.stream_id] = std::move(stream);
          }
          return 0;
        });
    nghttp2_session_callbacks_set_on_header_callback(
        callbacks, [](nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name,
                      size_t name_size, const uint8_t* value, size_t value_size, uint8_t,
                      void* self) {
          auto& connection = *static_cast<Connection*>(self);
          if (Stream* stream = connection.stream(frame->hd.stream_id)) {
            connection.header(*stream, {reinterpret_cast<const char*>(name), name_size},
                              {reinterpret_cast<const char*>(value), value_size});
          }
          return 0;
        });
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        callbacks, [](nghttp2_session*, uint8_t, int32_t number, const uint8_t* bytes, size_t size,
                      void* self) {
          auto& connection = *static_cast<Connection*>(self);
          if (Stream* stream = connection.stream(number)) connection.data(*stream, bytes, size);
          return 0;
        });
    nghttp2_session_callbacks_set_on_frame_recv_callback(
        callbacks, [](nghttp2_session*, const nghttp2_frame* frame, void* self) {
          auto& connection = *static_cast<Connection*>(self);
          if (frame->hd.type == NGHTTP2_RST_STREAM && connection.reset_too_often()) {
            return static_cast<int>(NGHTTP2_ERR_CALLBACK_FAILURE);
          }
          connection.greeted_ |= frame->hd.type == NGHTTP2_SETTINGS;
          Stream* stream = connection.stream(frame->hd.stream_id);
          if (!stream) return 0;
          if (frame->hd.type == NGHTTP2_HEADERS) connection.headed(*stream);
          if ((frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA) &&
              frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
            connection.whole(*stream);
          }
          return 0;
        });
    nghttp2_session_callbacks_set_on_frame_send_callback(
        callbacks, [](nghttp2_session* session, const nghttp2_frame* frame, void* self) {
          auto& connection = *static_cast<Connection*>(self);
          Stream* stream = connection.stream(frame->hd.stream_id);
          // A client whose answer is out need not send what nobody reads.
          if (stream && !stream->ended && frame->hd.type == NGHTTP2_HEADERS &&
              frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
            nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream->number,
                                      NGHTTP2_NO_ERROR);
          }
          return 0;
        });
    nghttp2_session_callbacks_set_on_stream_close_callback(
        callbacks, [](nghttp2_session*, int32_t number, uint32_t, void* self) {
          static_cast<Connection*>(self)->closed(number);
          return 0;
        });
    return callbacks;
  }();
  return made;
}

}  // namespace door
