#include <nearfar/nearfar.hpp>

#include <iostream>
#include <string>

int main() {
  const std::string version = std::to_string(NEARFAR_VERSION_MAJOR) + "." + std::to_string(NEARFAR_VERSION_MINOR) +
                              "." + std::to_string(NEARFAR_VERSION_PATCH);
  if (version != PACKAGE_VERSION) {
    std::cout << "The package is version " PACKAGE_VERSION ", but its header is version " << version << ".\n";
    return 1;
  }

  const nearfar::Matrix<float> tokens = nearfar::Matrix<float>::Identity(3, 4);
  nearfar::Matrix<float> out(3, 4);
  nearfar::Softmax<float>(nearfar::Heads{.query = 2, .key_value = 2, .dim = 2}).forward({tokens, tokens, tokens}, out);
  return out.allFinite() ? 0 : 1;
}
