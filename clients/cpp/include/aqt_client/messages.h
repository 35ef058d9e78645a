// What is asked and what is answered.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "aqt_client/tensor.h"

namespace aqt_client {

using Duration = std::chrono::nanoseconds;

// A value of what goes beside the tensors of a request or an answer.
using Parameter = std::variant<bool, std::int64_t, std::uint64_t, double, std::string>;
using Parameters = std::map<std::string, Parameter, std::less<>>;

struct Request {
  std::string model;
  std::vector<Input> inputs;
  // Empty: the server chooses.
  std::string version = {};
  // Comes back unchanged.
  std::string id = {};
  // The outputs that are wanted; empty: all of them.
  std::vector<std::string> outputs = {};
  // 1 goes before all, 10 after all; 0: the server's default.
  std::uint64_t priority = 0;
  // How long it may wait at the server until it is computed; 0: as long as its call has time.
  std::chrono::microseconds queue_timeout{0};
  Parameters parameters = {};
};

struct Result {
  std::string model;
  // The version that answered.
  std::string version;
  std::string id;
  std::vector<Output> outputs;
  Parameters parameters;
  // Whether it has the bits that training computes; nothing: the server does not say.
  std::optional<bool> exact;

  // The output of that name; throws std::out_of_range if there is none.
  const Output& operator[](std::string_view name) const;
};

struct ServerMetadata {
  std::string name;
  std::string version;
  std::vector<std::string> extensions;
};

// In `shape`, -1 is any size.
struct TensorMetadata {
  std::string name;
  std::string datatype;
  Shape shape;
};

struct ModelMetadata {
  std::string name;
  // Those that are served.
  std::vector<std::string> versions;
  std::string platform;
  std::vector<TensorMetadata> inputs;
  std::vector<TensorMetadata> outputs;
};

// Where a version is in its life, in the server's words, and why.
struct ModelState {
  std::string version;
  std::string state;
  std::string reason;
};

}  // namespace aqt_client
