#include <nearfar/nearfar.hpp>

#include <cstdio>
#include <cstring>

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

int main() {
  const char* version = TEXT(NEARFAR_VERSION_MAJOR) "." TEXT(NEARFAR_VERSION_MINOR) "." TEXT(NEARFAR_VERSION_PATCH);
  if (std::strcmp(version, PACKAGE_VERSION) != 0) {
    std::printf("The package is version %s, but its header is version %s.\n", PACKAGE_VERSION, version);
    return 1;
  }

  const nearfar::Matrix<float> tokens = nearfar::Matrix<float>::Identity(3, 4);
  nearfar::Matrix<float> out(3, 4);
  nearfar::Softmax<float>(nearfar::Heads{.query = 2, .key_value = 2, .dim = 2}).forward({tokens, tokens, tokens}, out);
  return out.allFinite() ? 0 : 1;
}
