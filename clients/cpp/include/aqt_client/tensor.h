// Tensors of a request, as views of the caller's memory, and of an answer.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

namespace aqt_client {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");
static_assert(sizeof(bool) == 1, "a BOOL of the wire is one byte");

// The datatypes of the protocol.
enum class Datatype {
  kBool, kUint8, kUint16, kUint32, kUint64, kInt8, kInt16, kInt32, kInt64, kFp16, kBf16, kFp32,
  kFp64, kBytes,
};

// The protocol's name of it: "BOOL", "UINT8" and so on.
std::string_view name_of(Datatype datatype);

// The bits of an FP16 and of a BF16, which C++20 has no types for.
struct Fp16 {
  std::uint16_t bits;
  bool operator==(const Fp16&) const = default;
};
struct Bf16 {
  std::uint16_t bits;
  bool operator==(const Bf16&) const = default;
};

// The datatype of elements of type T; not defined for any other type.
template <class T> struct DatatypeOf;
template <Datatype D> using Is = std::integral_constant<Datatype, D>;
template <> struct DatatypeOf<bool> : Is<Datatype::kBool> {};
template <> struct DatatypeOf<std::uint8_t> : Is<Datatype::kUint8> {};
template <> struct DatatypeOf<std::uint16_t> : Is<Datatype::kUint16> {};
template <> struct DatatypeOf<std::uint32_t> : Is<Datatype::kUint32> {};
template <> struct DatatypeOf<std::uint64_t> : Is<Datatype::kUint64> {};
template <> struct DatatypeOf<std::int8_t> : Is<Datatype::kInt8> {};
template <> struct DatatypeOf<std::int16_t> : Is<Datatype::kInt16> {};
template <> struct DatatypeOf<std::int32_t> : Is<Datatype::kInt32> {};
template <> struct DatatypeOf<std::int64_t> : Is<Datatype::kInt64> {};
template <> struct DatatypeOf<Fp16> : Is<Datatype::kFp16> {};
template <> struct DatatypeOf<Bf16> : Is<Datatype::kBf16> {};
template <> struct DatatypeOf<float> : Is<Datatype::kFp32> {};
template <> struct DatatypeOf<double> : Is<Datatype::kFp64> {};

template <class T>
concept Element = requires { DatatypeOf<T>::value; };

// Elements that lie in one piece and stay there: an array, a std::vector (not of bool, which has no
// elements in memory), a std::span; not a temporary container.
template <class R>
concept Elements = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> &&
                   std::ranges::borrowed_range<R> && Element<std::ranges::range_value_t<R>>;

// Strings of any kind that lie somewhere, or views of them.
template <class R>
concept Texts = std::ranges::forward_range<R> && std::ranges::borrowed_range<R> &&
                std::convertible_to<std::ranges::range_reference_t<R>, std::string_view> &&
                (std::is_lvalue_reference_v<std::ranges::range_reference_t<R>> ||
                 std::same_as<std::ranges::range_value_t<R>, std::string_view>);

// Sizes in elements, the batch dimension first.
using Shape = std::vector<std::int64_t>;

// A tensor to be sent: a view, so what it was made of has to live until it is sent.
class Input {
 public:
  // The tensor of `elements` in C order. Throws std::invalid_argument if they are not as many as
  // `shape` has.
  template <Elements R>
  Input(std::string name, Shape shape, R&& elements)
      : Input(std::move(name), std::move(shape), DatatypeOf<std::ranges::range_value_t<R>>::value,
              std::as_bytes(std::span(std::ranges::data(elements), std::ranges::size(elements))),
              std::ranges::size(elements)) {}

  // The same for BYTES.
  template <Texts R>
  Input(std::string name, Shape shape, R&& elements)
      : Input(std::move(name), std::move(shape), Datatype::kBytes, views_of(elements),
              static_cast<std::size_t>(std::ranges::distance(elements))) {}

  const std::string& name() const { return name_; }
  const Shape& shape() const { return shape_; }
  Datatype datatype() const { return datatype_; }
  // Appends the raw contents of the wire to `out`.
  void append_raw(std::string& out) const;

 private:
  using Held = std::variant<std::span<const std::byte>, std::vector<std::string_view>>;

  Input(std::string name, Shape shape, Datatype datatype, Held elements, std::size_t count);

  static std::vector<std::string_view> views_of(auto&& texts) {
    std::vector<std::string_view> views;
    for (std::string_view text : texts) views.push_back(text);
    return views;
  }

  std::string name_;
  Shape shape_;
  Datatype datatype_;
  Held elements_;
};

// A tensor of an answer. It shares the answer's memory and keeps it, and so does a copy.
class Output {
 public:
  const std::string& name() const { return name_; }
  const Shape& shape() const { return shape_; }
  Datatype datatype() const { return datatype_; }

  // The elements in C order, while this or a copy of it lives. Throws std::invalid_argument if they
  // are of another datatype.
  template <Element T> std::span<const T> as() const {
    check(DatatypeOf<T>::value);
    return {reinterpret_cast<const T*>(raw_.data()), raw_.size() / sizeof(T)};
  }

  // The same for BYTES.
  std::span<const std::string_view> texts() const;

 private:
  friend class Decoder;
  Output() = default;
  void check(Datatype asked) const;

  std::string name_;
  Shape shape_;
  Datatype datatype_;
  std::span<const std::byte> raw_;
  std::vector<std::string_view> texts_;
  std::shared_ptr<const void> memory_;
};

}  // namespace aqt_client
