// Asks a server for the digit of one image, as `make demo` trains it.
//
//     digits ADDRESS
#include <aqt_client/client.h>

#include <array>
#include <iostream>

int main(int argc, char** argv) {
  const std::string address = argc > 1 ? argv[1] : "localhost:8001";
  // [README
  std::array<float, 64> image{};  // 8 x 8 pixels of 0 to 16: a stroke down the middle, a one
  for (std::size_t row = 0; row < 8; ++row) image[8 * row + 3] = image[8 * row + 4] = 16;

  const aqt_client::Client client({address});
  const auto result = client.infer({.model = "digits", .inputs = {{"image", {1, 8, 8}, image}}});
  std::cout << "digit " << result["digit"].as<std::int32_t>()[0] << ", "
            << (result.exact.value_or(false) ? "exact" : "not exact") << '\n';
  // README]
}
