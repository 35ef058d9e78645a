// The thread that listens: connections to calls for Python, and its answers back to them.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "connection.h"

namespace door {

// What Python takes: requests, and the calls whose answers nobody waits for any more.
struct Taken {
  std::vector<Request> requests;
  std::vector<uint64_t> gone;
};

class Door final : public Calls {
 public:
  // Listens, and takes connections from `start` on. Throws std::system_error or runtime_error.
  Door(const std::string& host, const std::string& port, const Limits& limits);
  ~Door() override;

  void start();
  int port() const;
  // Readable while there is something to take.
  int notifications() const { return notify_; }
  Taken take();
  void answer(std::vector<Response>&& responses);
  // Takes no more, answers what was taken for so many seconds at most, and ends the thread.
  void close(double grace_s);

 private:
  bool made(Request&& request, Connection& by, int32_t stream) override;
  void gone(uint64_t call) override;
  bool take_room(size_t bytes) override;
  void give_room(size_t bytes) override;
  uint64_t next_call() override { return ++last_call_; }

  void run();
  void accept();
  void listen(bool on);
  void serve(Connection& connection, uint32_t events);
  void send_answers();
  void write(Connection& connection);
  void watch(Connection& connection);
  void tick(double now);
  void publish();
  void end(int descriptor);

  const Limits limits_;
  int listener_ = -1, epoll_ = -1, wake_ = -1, notify_ = -1;
  std::thread thread_;
  std::atomic<bool> closing_{false};
  std::atomic<double> ends_s_{0};
  std::atomic<size_t> buffered_{0};

  // Of the thread alone.
  struct Caller {
    Connection* connection;  // null: gone
    int32_t stream;
  };
  std::unordered_map<int, std::unique_ptr<Connection>> connections_;
  std::unordered_map<uint64_t, Caller> callers_;
  Taken fresh_;
  uint64_t last_call_ = 0;
  bool draining_ = false, listening_ = true;

  // Of both.
  std::mutex mutex_;
  Taken waiting_;
  std::vector<Response> answers_;
};

}  // namespace door
