// What the client is made of: messages of the protocol, statuses and addresses.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "aqt_client/client.h"
#include "open_inference.pb.h"

namespace aqt_client {

// The largest message sent or received: 64 Mi float32 values, and still no end of the memory.
inline constexpr int kMaxMessageBytes = 256 << 20;

// Bytes of an element; 0 for BYTES.
std::size_t bytes_of(Datatype datatype);

// Throws std::invalid_argument if the protocol has no datatype of that name.
Datatype datatype_named(std::string_view name);

// Elements of that shape. Throws std::invalid_argument if it is the shape of none.
std::size_t count_of(const Shape& shape);

// The message of a request, with raw contents. Throws std::invalid_argument if it is too large.
inference::ModelInferRequest encode(const Request& request);

// What a response stands for, from raw or typed contents. Throws Error if it breaks the protocol.
Result decode(std::shared_ptr<inference::ModelInferResponse> response);

ModelMetadata metadata_of(const inference::ModelMetadataResponse& response);

// The error that stands for a status that is not OK.
Error error_of(const grpc::Status& status);

// The error of one request of a stream, whose status is in the parameters of its response.
Error error_of(const std::string& sentence, const inference::ModelInferResponse& response);

// What gRPC connects to, and with which settings.
struct Target {
  std::string name;
  grpc::ChannelArguments arguments;
};
Target target_of(const std::vector<std::string>& addresses);

}  // namespace aqt_client
