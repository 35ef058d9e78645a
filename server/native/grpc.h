// What gRPC writes into HTTP/2: prefixes of messages, timeouts and sentences.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace door {

constexpr size_t kPrefix = 5;  // of a message: compressed or not, and its length

// As grpc-message has to be written: what is not printable ASCII in percent.
inline std::string percent_encoded(const std::string& text) {
  static const char kDigits[] = "0123456789ABCDEF";
  std::string out;
  for (unsigned char c : text) {
    if (c >= 0x20 && c <= 0x7e && c != '%') {
      out += static_cast<char>(c);
    } else {
      out += {'%', kDigits[c >> 4], kDigits[c & 15]};
    }
  }
  return out;
}

inline size_t length_of(const std::string& body) {
  const auto* prefix = reinterpret_cast<const uint8_t*>(body.data());
  return size_t{prefix[1]} << 24 | prefix[2] << 16 | prefix[3] << 8 | prefix[4];
}

// Seconds of a grpc-timeout: at most 8 digits and a unit; negative if it is not of that form.
inline double timeout_of(std::string_view value) {
  if (value.size() < 2 || value.size() > 9) return -1;
  double number = 0;
  for (char c : value.substr(0, value.size() - 1)) {
    if (c < '0' || c > '9') return -1;
    number = number * 10 + (c - '0');
  }
  switch (value.back()) {
    case 'H': return number * 3600;
    case 'M': return number * 60;
    case 'S': return number;
    case 'm': return number * 1e-3;
    case 'u': return number * 1e-6;
    case 'n': return number * 1e-9;
    default: return -1;
  }
}

}  // namespace door
