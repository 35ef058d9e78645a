// What a call can fail with.
#pragma once

#include <grpcpp/support/status.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "aqt_client/messages.h"

namespace aqt_client {

// gRPC's name of it: "NOT_FOUND" and so on.
std::string_view name_of(grpc::StatusCode code);

// A call failed; what() is the server's sentence. Arguments that cannot be sent at all are
// std::invalid_argument, thrown before anything is sent.
class Error : public std::runtime_error {
 public:
  Error(const std::string& sentence, grpc::StatusCode code, Duration retry_after = {})
      : std::runtime_error(sentence), code_(code), retry_after_(retry_after) {}

  grpc::StatusCode code() const { return code_; }
  // After how long the server would have it repeated; 0 where it does not say.
  Duration retry_after() const { return retry_after_; }
  // Whether the same call may succeed later: the server was away, or had too much to do.
  bool temporary() const;

 private:
  grpc::StatusCode code_;
  Duration retry_after_;
};

}  // namespace aqt_client
