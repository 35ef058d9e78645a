#include "aqt_client/error.h"

#include <algorithm>
#include <array>
#include <utility>

#include "retry_info.pb.h"
#include "wire.h"

namespace aqt_client {

namespace {

constexpr std::string_view kRetryInfo = "type.googleapis.com/google.rpc.RetryInfo";

// By the values of grpc::StatusCode.
constexpr std::array<std::string_view, 17> kCodes{
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
};

// What google.rpc.RetryInfo in the details of a status says; 0 without one.
Duration retry_after(std::string_view bytes) {
  details::Status status;
  if (!status.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return {};
  for (const auto& detail : status.details()) {
    details::RetryInfo info;
    if (detail.type_url() != kRetryInfo || !info.ParseFromString(detail.value())) continue;
    // Of a day, so that no number that a server writes overflows.
    const auto seconds = std::clamp<std::int64_t>(info.retry_delay().seconds(), 0, 86'400);
    const auto nanos = std::clamp(info.retry_delay().nanos(), 0, 999'999'999);
    return std::chrono::seconds(seconds) + std::chrono::nanoseconds(nanos);
  }
  return {};
}

}  // namespace

std::string_view name_of(grpc::StatusCode code) {
  const auto index = static_cast<std::size_t>(code);
  return index < kCodes.size() ? kCodes[index] : "UNKNOWN";
}

bool Error::temporary() const {
  switch (code_) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::CANCELLED:  // of a server that stops; a caller cannot cancel
      return true;
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      // gRPC gives a message that is too large the code of a server that is overloaded.
      return std::string_view(what()).find("message larger than max") == std::string_view::npos;
    default:
      return false;
  }
}

Error error_of(const grpc::Status& status) {
  std::string sentence = status.error_message();
  if (sentence.empty()) {
    sentence = "the server gave no reason for " + std::string(name_of(status.error_code()));
  }
  return {sentence, status.error_code(), retry_after(status.error_details())};
}

Error error_of(const std::string& sentence, const inference::ModelInferResponse& response) {
  const auto found = response.parameters().find("aqt_status");
  auto code = grpc::StatusCode::UNKNOWN;
  if (found != response.parameters().end()) {
    const auto name = std::ranges::find(kCodes, found->second.string_param());
    if (name != kCodes.end()) code = static_cast<grpc::StatusCode>(name - kCodes.begin());
  }
  return {sentence, code};
}

}  // namespace aqt_client
