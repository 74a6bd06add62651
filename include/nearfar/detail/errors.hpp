#pragma once

#include <nearfar/tokens.hpp>

#include <concepts>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// In few digits that give the same number again. (By the C library: streams cost every program that includes this
/// more to compile, and not every standard library prints numbers by <charconv>.)
inline std::string text_of_real(double value) {
  char text[32];
  for (int digits = 3; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}

/// A part of an error message: text, which must outlive it, or a number. Every check makes some and hardly one reads
/// them, so they become text no sooner than that.
class MessagePart {
 public:
  MessagePart(std::string_view text) : kind_(Kind::text), text_(text.data()), size_(text.size()) {}
  MessagePart(const std::string& text) : MessagePart(std::string_view(text)) {}
  MessagePart(const char* text) : MessagePart(std::string_view(text)) {}
  MessagePart(std::floating_point auto number) : kind_(Kind::real), real_(number) {}
  MessagePart(std::integral auto number) : kind_(Kind::whole), whole_(static_cast<Index>(number)) {}

  void append_to(std::string& message) const {
    switch (kind_) {
      case Kind::text:
        message.append(text_, size_);
        break;
      case Kind::real:
        message += text_of_real(real_);
        break;
      case Kind::whole:
        message += std::to_string(whole_);
        break;
    }
  }

 private:
  enum class Kind { text, real, whole } kind_;
  union {
    const char* text_;
    double real_;
    Index whole_;
  };
  std::size_t size_ = 0;
};

[[noreturn]] inline void refuse(std::string_view mechanism, std::initializer_list<MessagePart> parts) {
  std::string message = "nearfar::";
  message += mechanism;
  message += ": ";
  for (const MessagePart& part : parts) part.append_to(message);
  throw std::invalid_argument(message);
}

/// Throws std::invalid_argument "nearfar::<mechanism>: <sentence>" unless the condition holds.
template <class... Parts>
void require(bool condition, std::string_view mechanism, const Parts&... parts) {
  if (!condition) refuse(mechanism, {parts...});
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
