#include "aqt_client/messages.h"

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "wire.h"

namespace aqt_client {

namespace {

using Contents = inference::InferTensorContents;

inference::InferParameter parameter_of(const Parameter& value) {
  inference::InferParameter made;
  std::visit(
      [&made](const auto& held) {
        using T = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<T, bool>) made.set_bool_param(held);
        else if constexpr (std::is_same_v<T, std::int64_t>) made.set_int64_param(held);
        else if constexpr (std::is_same_v<T, std::uint64_t>) made.set_uint64_param(held);
        else if constexpr (std::is_same_v<T, double>) made.set_double_param(held);
        else made.set_string_param(held);
      },
      value);
  return made;
}

Parameter value_of(const inference::InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kBoolParam: return parameter.bool_param();
    case inference::InferParameter::kInt64Param: return parameter.int64_param();
    case inference::InferParameter::kUint64Param: return parameter.uint64_param();
    case inference::InferParameter::kDoubleParam: return parameter.double_param();
    default: return parameter.string_param();
  }
}

[[noreturn]] void wrong(const std::string& what) { throw std::invalid_argument(what); }

void expect(std::size_t found, std::size_t expected, const char* of) {
  if (found != expected) {
    wrong("its shape takes " + std::to_string(expected) + " " + of + ", got " +
          std::to_string(found));
  }
}

std::vector<std::string_view> texts_of(std::string_view raw, std::size_t count) {
  std::vector<std::string_view> texts;
  while (texts.size() < count) {
    std::uint32_t length = 0;
    if (raw.size() < sizeof(length)) wrong("it ends in element " + std::to_string(texts.size()));
    std::memcpy(&length, raw.data(), sizeof(length));
    raw.remove_prefix(sizeof(length));
    if (raw.size() < length) wrong("it ends in element " + std::to_string(texts.size()));
    texts.push_back(raw.substr(0, length));
    raw.remove_prefix(length);
  }
  if (!raw.empty()) wrong(std::to_string(raw.size()) + " bytes follow its elements");
  return texts;
}

// Memory of its own, at a multiple of any element's size.
using Own = std::vector<std::uint64_t>;

std::shared_ptr<Own> own(std::size_t bytes) {
  return std::make_shared<Own>((bytes + sizeof(Own::value_type) - 1) / sizeof(Own::value_type));
}

}  // namespace

const Output& Result::operator[](std::string_view name) const {
  std::string names;
  for (const Output& output : outputs) {
    if (output.name() == name) return output;
    names += (names.empty() ? "" : ", ") + output.name();
  }
  throw std::out_of_range("no output '" + std::string(name) + "' in the answer, which has " + names);
}

inference::ModelInferRequest encode(const Request& request) {
  inference::ModelInferRequest message;
  message.set_model_name(request.model);
  message.set_model_version(request.version);
  message.set_id(request.id);
  auto& parameters = *message.mutable_parameters();
  for (const auto& [name, value] : request.parameters) parameters[name] = parameter_of(value);
  if (request.priority) parameters["priority"].set_uint64_param(request.priority);
  if (request.queue_timeout.count()) {
    parameters["timeout"].set_int64_param(request.queue_timeout.count());
  }
  for (const Input& input : request.inputs) {
    auto& tensor = *message.add_inputs();
    tensor.set_name(input.name());
    tensor.set_datatype(std::string(name_of(input.datatype())));
    tensor.mutable_shape()->Add(input.shape().begin(), input.shape().end());
    input.append_raw(*message.add_raw_input_contents());
  }
  for (const std::string& name : request.outputs) message.add_outputs()->set_name(name);
  if (const auto bytes = message.ByteSizeLong(); bytes > std::size_t{kMaxMessageBytes}) {
    wrong("the request has " + std::to_string(bytes) + " bytes and a message holds at most " +
          std::to_string(kMaxMessageBytes) + ": send fewer rows in each request");
  }
  return message;
}

// The only one that makes outputs.
class Decoder {
 public:
  explicit Decoder(std::shared_ptr<const inference::ModelInferResponse> response)
      : response_(std::move(response)) {}

  // Throws std::invalid_argument if it breaks the protocol.
  Output output(int index) const {
    const auto& tensor = response_->outputs(index);
    Output made;
    made.name_ = tensor.name();
    made.shape_.assign(tensor.shape().begin(), tensor.shape().end());
    made.datatype_ = datatype_named(tensor.datatype());
    made.memory_ = response_;
    if (response_->raw_output_contents_size() == 0) {
      typed(tensor.contents(), made);
    } else if (index < response_->raw_output_contents_size()) {
      raw(response_->raw_output_contents(index), made);
    } else {
      wrong("it has no raw contents");
    }
    return made;
  }

 private:
  static void raw(const std::string& contents, Output& made) {
    const std::size_t count = count_of(made.shape_);
    if (made.datatype_ == Datatype::kBytes) {
      made.texts_ = texts_of(contents, count);
      return;
    }
    const std::size_t size = bytes_of(made.datatype_);
    expect(contents.size(), count * size, "bytes");
    if (made.datatype_ == Datatype::kBool) {
      for (char element : contents) {
        if (element != 0 && element != 1) wrong("a BOOL of it is neither 0 nor 1");
      }
    }
    if (reinterpret_cast<std::uintptr_t>(contents.data()) % size == 0) {
      made.raw_ = std::as_bytes(std::span(contents));
    } else {  // A short one lies in its std::string, of which not every library places it well.
      auto copy = own(contents.size());
      std::memcpy(copy->data(), contents.data(), contents.size());
      made.raw_ = std::as_bytes(std::span(*copy)).first(contents.size());
      made.memory_ = std::move(copy);
    }
  }

  // The elements where they are, if they are as wide there as their datatype.
  static void typed(const Contents& contents, Output& made) {
    switch (made.datatype_) {
      case Datatype::kBool: return view(contents.bool_contents(), made);
      case Datatype::kUint8: return narrow<std::uint8_t>(contents.uint_contents(), made);
      case Datatype::kUint16: return narrow<std::uint16_t>(contents.uint_contents(), made);
      case Datatype::kUint32: return view(contents.uint_contents(), made);
      case Datatype::kUint64: return view(contents.uint64_contents(), made);
      case Datatype::kInt8: return narrow<std::int8_t>(contents.int_contents(), made);
      case Datatype::kInt16: return narrow<std::int16_t>(contents.int_contents(), made);
      case Datatype::kInt32: return view(contents.int_contents(), made);
      case Datatype::kInt64: return view(contents.int64_contents(), made);
      case Datatype::kFp32: return view(contents.fp32_contents(), made);
      case Datatype::kFp64: return view(contents.fp64_contents(), made);
      case Datatype::kBytes:
        expect(static_cast<std::size_t>(contents.bytes_contents_size()), count_of(made.shape_),
               "elements");
        made.texts_.assign(contents.bytes_contents().begin(), contents.bytes_contents().end());
        return;
      default: wrong("its datatype has no typed contents");
    }
  }

  template <class T>
  static void view(const google::protobuf::RepeatedField<T>& field, Output& made) {
    expect(static_cast<std::size_t>(field.size()), count_of(made.shape_), "elements");
    made.raw_ = std::as_bytes(std::span(field.data(), static_cast<std::size_t>(field.size())));
  }

  template <class T, class Wide>
  static void narrow(const google::protobuf::RepeatedField<Wide>& field, Output& made) {
    expect(static_cast<std::size_t>(field.size()), count_of(made.shape_), "elements");
    auto copy = own(static_cast<std::size_t>(field.size()) * sizeof(T));
    auto* to = reinterpret_cast<std::byte*>(copy->data());
    for (Wide element : field) {
      const auto narrowed = static_cast<T>(element);
      if (Wide{narrowed} != element) wrong("an element is out of the range of its datatype");
      std::memcpy(to, &narrowed, sizeof(T));
      to += sizeof(T);
    }
    made.raw_ = {reinterpret_cast<const std::byte*>(copy->data()), to};
    made.memory_ = std::move(copy);
  }

  std::shared_ptr<const inference::ModelInferResponse> response_;
};

Result decode(std::shared_ptr<inference::ModelInferResponse> response) {
  Result result{.model = response->model_name(),
                .version = response->model_version(),
                .id = response->id(),
                .outputs = {},
                .parameters = {},
                .exact = {}};
  for (const auto& [name, parameter] : response->parameters()) {
    result.parameters.emplace(name, value_of(parameter));
  }
  if (const auto found = result.parameters.find("aqt_exact"); found != result.parameters.end()) {
    if (const bool* exact = std::get_if<bool>(&found->second)) result.exact = *exact;
  }
  const Decoder decoder(response);
  for (int i = 0; i < response->outputs_size(); ++i) {
    try {
      result.outputs.push_back(decoder.output(i));
    } catch (const std::invalid_argument& error) {
      throw Error("the server's answer breaks the protocol: output '" +
                      response->outputs(i).name() + "': " + error.what(),
                  grpc::StatusCode::INTERNAL);
    }
  }
  return result;
}

ModelMetadata metadata_of(const inference::ModelMetadataResponse& response) {
  const auto tensors = [](const auto& found) {
    std::vector<TensorMetadata> made;
    for (const auto& tensor : found) {
      made.push_back({tensor.name(), tensor.datatype(),
                      Shape(tensor.shape().begin(), tensor.shape().end())});
    }
    return made;
  };
  return {.name = response.name(),
          .versions = {response.versions().begin(), response.versions().end()},
          .platform = response.platform(),
          .inputs = tensors(response.inputs()),
          .outputs = tensors(response.outputs())};
}

}  // namespace aqt_client
