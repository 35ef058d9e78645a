#include "aqt_client/tensor.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "wire.h"

namespace aqt_client {

namespace {

struct Kind {
  std::string_view name;
  std::size_t bytes;
};

// By the values of Datatype.
constexpr std::array<Kind, 14> kKinds{{
    {"BOOL", 1}, {"UINT8", 1}, {"UINT16", 2}, {"UINT32", 4}, {"UINT64", 8}, {"INT8", 1},
    {"INT16", 2}, {"INT32", 4}, {"INT64", 8}, {"FP16", 2}, {"BF16", 2}, {"FP32", 4}, {"FP64", 8},
    {"BYTES", 0},
}};

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

}  // namespace

std::string_view name_of(Datatype datatype) {
  return kKinds.at(static_cast<std::size_t>(datatype)).name;
}

std::size_t bytes_of(Datatype datatype) {
  return kKinds.at(static_cast<std::size_t>(datatype)).bytes;
}

Datatype datatype_named(std::string_view name) {
  for (std::size_t i = 0; i < kKinds.size(); ++i) {
    if (kKinds[i].name == name) return static_cast<Datatype>(i);
  }
  throw std::invalid_argument("'" + std::string(name) + "' is not a datatype of the protocol");
}

std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (std::int64_t size : shape) {
    if (size < 0) {
      throw std::invalid_argument("shape " + text_of(shape) + " has a negative size: give each");
    }
    const auto known = static_cast<std::size_t>(size);
    if (known && count > std::numeric_limits<std::size_t>::max() / 8 / known) {
      throw std::invalid_argument("shape " + text_of(shape) + " has more elements than memory");
    }
    count *= known;
  }
  return count;
}

Input::Input(std::string name, Shape shape, Datatype datatype, Held elements, std::size_t count)
    : name_(std::move(name)),
      shape_(std::move(shape)),
      datatype_(datatype),
      elements_(std::move(elements)) {
  if (const std::size_t expected = count_of(shape_); count != expected) {
    throw std::invalid_argument("input '" + name_ + "' of shape " + text_of(shape_) + " takes " +
                                std::to_string(expected) + " elements, got " +
                                std::to_string(count));
  }
  const auto* texts = std::get_if<std::vector<std::string_view>>(&elements_);
  if (texts && std::ranges::any_of(*texts, [](std::string_view text) {
        return text.size() > std::numeric_limits<std::uint32_t>::max();
      })) {
    throw std::invalid_argument("an element of input '" + name_ + "' has 4 GiB or more: split it");
  }
}

void Input::append_raw(std::string& out) const {
  if (const auto* raw = std::get_if<std::span<const std::byte>>(&elements_)) {
    out.append(reinterpret_cast<const char*>(raw->data()), raw->size());
    return;
  }
  const auto& texts = std::get<std::vector<std::string_view>>(elements_);
  std::size_t bytes = out.size();
  for (std::string_view text : texts) bytes += sizeof(std::uint32_t) + text.size();
  out.reserve(bytes);
  for (std::string_view text : texts) {
    const auto length = static_cast<std::uint32_t>(text.size());
    out.append(reinterpret_cast<const char*>(&length), sizeof(length)).append(text);
  }
}

void Output::check(Datatype asked) const {
  if (asked != datatype_) {
    throw std::invalid_argument("output '" + name_ + "' is of " + std::string(name_of(datatype_)) +
                                ", and was asked for as " + std::string(name_of(asked)));
  }
}

std::span<const std::string_view> Output::texts() const {
  check(Datatype::kBytes);
  return texts_;
}

}  // namespace aqt_client
