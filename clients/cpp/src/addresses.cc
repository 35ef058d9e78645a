#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <stdexcept>

#include "wire.h"

namespace aqt_client {

namespace {

// A server that loads, stops or hangs up is left out; one without the service is healthy.
constexpr const char* kBalanced =
    R"({"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":""}})";

// "IP:port" of all that the address stands for: those of IPv4, or where it has none, of IPv6.
std::vector<std::string> resolved(const std::string& address, int& family) {
  const std::size_t colon = address.rfind(':');
  const bool named = colon != std::string::npos && colon + 1 < address.size();
  std::string host = address.substr(0, named ? colon : 0);
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  const std::string port = named ? address.substr(colon + 1) : "";
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int failed = named ? getaddrinfo(host.c_str(), port.c_str(), &hints, &found) : EAI_NONAME;
  if (failed) {
    throw std::invalid_argument("`addresses` has '" + address +
                                "', which is no 'host:port' with an IP: " + gai_strerror(failed));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> all(found, &freeaddrinfo);
  std::vector<std::string> in_4, in_6;
  for (const addrinfo* one = found; one; one = one->ai_next) {
    char ip[NI_MAXHOST];
    if (getnameinfo(one->ai_addr, one->ai_addrlen, ip, sizeof(ip), nullptr, 0, NI_NUMERICHOST)) {
      continue;
    }
    if (one->ai_family == AF_INET) in_4.push_back(std::string(ip) + ":" + port);
    if (one->ai_family == AF_INET6) in_6.push_back("[" + std::string(ip) + "]:" + port);
  }
  family = in_4.empty() ? AF_INET6 : AF_INET;
  return in_4.empty() ? in_6 : in_4;
}

// All of them in the form in which gRPC takes several: by their IPs, of one family.
std::string joined(const std::vector<std::string>& addresses) {
  std::vector<std::string> ips;
  int family = AF_UNSPEC;
  for (const std::string& address : addresses) {
    int of = AF_UNSPEC;
    for (std::string& ip : resolved(address, of)) {
      if (std::ranges::find(ips, ip) == ips.end()) ips.push_back(std::move(ip));
    }
    if (family != AF_UNSPEC && family != of) {
      throw std::invalid_argument("`addresses` has both IPv4 and IPv6, and gRPC takes one");
    }
    family = of;
  }
  std::string target = family == AF_INET ? "ipv4:" : "ipv6:";
  for (std::size_t i = 0; i < ips.size(); ++i) target += (i ? "," : "") + ips[i];
  return target;
}

}  // namespace

Target target_of(const std::vector<std::string>& addresses) {
  if (addresses.empty()) {
    throw std::invalid_argument("`addresses` is empty: give one or more of the form 'host:port'");
  }
  Target target{.name = addresses.front(), .arguments = {}};
  target.arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // A server that restarts is back in a second or two, and gRPC would wait up to two minutes before
  // it connects again, failing every attempt meanwhile.
  target.arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  target.arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  if (addresses.size() > 1) {
    target.name = joined(addresses);
    const std::string& first = addresses.front();
    target.arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, first.substr(0, first.rfind(':')));
  }
  if (addresses.size() > 1 || target.name.find("://") != std::string::npos) {
    target.arguments.SetServiceConfigJSON(kBalanced);
  }
  return target;
}

}  // namespace aqt_client
