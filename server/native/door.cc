#include "door.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <set>
#include <stdexcept>
#include <system_error>

namespace door {
namespace {

constexpr int kEvents = 256;
constexpr int kTickMs = 1000;

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

void signal(int event) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t done = ::write(event, &one, sizeof one);
}

void clear(int event) {
  uint64_t count;
  [[maybe_unused]] const ssize_t done = ::read(event, &count, sizeof count);
}

int listening(const std::string& host, const std::string& port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  if (const int failed = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found)) {
    throw std::runtime_error(::gai_strerror(failed));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> freed(found, ::freeaddrinfo);
  const int fd = checked(::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0),
                         "socket");
  const int on = 1, off = 0;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (found->ai_family == AF_INET6) ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  if (::bind(fd, found->ai_addr, found->ai_addrlen) || ::listen(fd, SOMAXCONN)) {
    const int error = errno;
    ::close(fd);
    throw std::system_error(error, std::generic_category());
  }
  return fd;
}

// As gRPC writes it: ipv4:1.2.3.4:5 or ipv6:[::1]:5.
std::string peer_of(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& ipv4 = reinterpret_cast<const sockaddr_in&>(address);
    ::inet_ntop(AF_INET, &ipv4.sin_addr, text, sizeof text);
    return std::string("ipv4:") + text + ":" + std::to_string(ntohs(ipv4.sin_port));
  }
  const auto& ipv6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&ipv6.sin6_addr)) {
    ::inet_ntop(AF_INET, ipv6.sin6_addr.s6_addr + 12, text, sizeof text);
    return std::string("ipv4:") + text + ":" + std::to_string(ntohs(ipv6.sin6_port));
  }
  ::inet_ntop(AF_INET6, &ipv6.sin6_addr, text, sizeof text);
  return std::string("ipv6:[") + text + "]:" + std::to_string(ntohs(ipv6.sin6_port));
}

}  // namespace

Door::Door(const std::string& host, const std::string& port, const Limits& limits)
    : limits_(limits) {
  listener_ = listening(host, port);
  try {
    epoll_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    wake_ = checked(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
    notify_ = checked(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd");
    for (int fd : {listener_, wake_}) {
      epoll_event event{EPOLLIN, {.fd = fd}};
      checked(::epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
    }
  } catch (...) {
    for (int fd : {listener_, epoll_, wake_, notify_}) if (fd >= 0) ::close(fd);
    throw;
  }
}

Door::~Door() {
  close(0);
  connections_.clear();
  for (int fd : {listener_, epoll_, wake_, notify_}) if (fd >= 0) ::close(fd);
}

void Door::start() { thread_ = std::thread(&Door::run, this); }

int Door::port() const {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  checked(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), "getsockname");
  return ntohs(address.ss_family == AF_INET
                   ? reinterpret_cast<const sockaddr_in&>(address).sin_port
                   : reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
}

Taken Door::take() {
  clear(notify_);
  Taken taken;
  {
    const std::lock_guard lock(mutex_);
    std::swap(taken, waiting_);
  }
  const double now = now_s();
  for (Request& request : taken.requests) {
    give_room(request.body.size());
    // It has waited for the rest of its message, and to be taken.
    if (request.timeout_s >= 0) {
      request.timeout_s = std::max(0.0, request.timeout_s - (now - request.began_s));
    }
  }
  return taken;
}

void Door::answer(std::vector<Response>&& responses) {
  bool first;
  {
    const std::lock_guard lock(mutex_);
    first = answers_.empty();
    std::move(responses.begin(), responses.end(), std::back_inserter(answers_));
  }
  if (first) signal(wake_);
}

void Door::close(double grace_s) {
  if (!thread_.joinable()) return;
  ends_s_ = now_s() + grace_s;
  closing_ = true;
  signal(wake_);
  thread_.join();
}

bool Door::made(Request&& request, Connection& by, int32_t stream) {
  if (callers_.size() >= limits_.calls) return false;
  callers_[request.call] = {&by, stream};
  fresh_.requests.push_back(std::move(request));
  return true;
}

void Door::gone(uint64_t call) {
  // Kept until it is answered: it is still computed, and counts.
  auto found = callers_.find(call);
  if (found == callers_.end()) return;
  found->second.connection = nullptr;
  fresh_.gone.push_back(call);
}

bool Door::take_room(size_t bytes) {
  return (buffered_ += bytes) <= limits_.buffered_bytes;
}

void Door::give_room(size_t bytes) { buffered_ -= bytes; }

void Door::run() {
  epoll_event events[kEvents];
  double ticked = now_s();
  for (;;) {
    const int count = ::epoll_wait(epoll_, events, kEvents, draining_ ? 10 : kTickMs);
    for (int i = 0; i < count; ++i) {
      const int fd = events[i].data.fd;
      if (fd == listener_) {
        accept();
      } else if (fd == wake_) {
        clear(wake_);
      } else if (auto found = connections_.find(fd); found != connections_.end()) {
        serve(*found->second, events[i].events);
      }
    }
    send_answers();
    publish();
    const double now = now_s();
    if (now - ticked > kTickMs / 1e3) tick(ticked = now);
    if (closing_ && !draining_) {
      draining_ = true;
      listen(false);
      std::vector<int> all;
      for (auto& [fd, connection] : connections_) all.push_back(fd);
      for (int fd : all) {
        connections_[fd]->drain();
        write(*connections_[fd]);
      }
    }
    if (draining_) {
      bool idle = true;
      for (auto& [fd, connection] : connections_) idle &= connection->idle();
      if (idle || now >= ends_s_) return;
    }
  }
}

void Door::accept() {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  const int fd = ::accept4(listener_, reinterpret_cast<sockaddr*>(&address), &size,
                           SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) {
    // Without a descriptor for it, it would be announced again and again.
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) listen(false);
    return;
  }
  if (connections_.size() >= limits_.connections) {
    ::close(fd);
    return;
  }
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  connections_[fd] = std::make_unique<Connection>(fd, peer_of(address), limits_, *this);
  epoll_event event{EPOLLIN, {.fd = fd}};
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event)) return end(fd);
  write(*connections_[fd]);
}

void Door::serve(Connection& connection, uint32_t events) {
  if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !connection.read()) {
    connection.write();
    return end(connection.descriptor());
  }
  write(connection);
}

void Door::send_answers() {
  std::vector<Response> answers;
  {
    const std::lock_guard lock(mutex_);
    std::swap(answers, answers_);
  }
  std::set<int> answered;
  for (Response& response : answers) {
    auto found = callers_.find(response.call);
    if (found == callers_.end()) continue;
    const Caller caller = found->second;
    callers_.erase(found);
    if (!caller.connection) continue;
    caller.connection->answer(caller.stream, std::move(response));
    answered.insert(caller.connection->descriptor());
  }
  // One write for all answers to a connection.
  for (int fd : answered) {
    if (auto found = connections_.find(fd); found != connections_.end()) write(*found->second);
  }
}

void Door::write(Connection& connection) {
  if (connection.write()) {
    watch(connection);
  } else {
    end(connection.descriptor());
  }
}

void Door::watch(Connection& connection) {
  const int fd = connection.descriptor();
  const bool wanted = connection.writing();
  if (wanted == connection.watched) return;
  connection.watched = wanted;
  epoll_event event{wanted ? EPOLLIN | EPOLLOUT : EPOLLIN, {.fd = fd}};
  ::epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
}

void Door::listen(bool on) {
  if (on == listening_) return;
  listening_ = on;
  epoll_event event{EPOLLIN, {.fd = listener_}};
  ::epoll_ctl(epoll_, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, listener_, &event);
}

void Door::tick(double now) {
  if (!draining_) listen(true);
  std::vector<int> all;
  for (auto& [fd, connection] : connections_) all.push_back(fd);
  for (int fd : all) {
    if (connections_[fd]->alive(now)) {
      write(*connections_[fd]);
    } else {
      end(fd);
    }
  }
}

void Door::publish() {
  if (fresh_.requests.empty() && fresh_.gone.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    std::move(fresh_.requests.begin(), fresh_.requests.end(),
              std::back_inserter(waiting_.requests));
    waiting_.gone.insert(waiting_.gone.end(), fresh_.gone.begin(), fresh_.gone.end());
  }
  fresh_.requests.clear();
  fresh_.gone.clear();
  signal(notify_);
}

void Door::end(int descriptor) {
  // Its descriptor leaves the epoll set as it is closed.
  connections_.erase(descriptor);
}

}  // namespace door
