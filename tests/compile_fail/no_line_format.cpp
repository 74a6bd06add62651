// nearfar: a mechanism of AnyAttention is an Attention with a type Options, a constructor from heads and options,
// options() const, and a specialisation of nearfar::LineFormat for its Options.
#include <nearfar/any_attention.hpp>

struct OwnOptions {};

struct Own {
  using Scalar = float;
  using Options = OwnOptions;

  explicit Own(const nearfar::Heads&, const Options& = {}) {}
  nearfar::Heads heads() const { return {}; }
  const Options& options() const { return options_; }
  void forward(const nearfar::Inputs<float>&, nearfar::Tokens<float>) const {}

 private:
  Options options_;
};

#ifndef MUST_FAIL
template <>
struct nearfar::LineFormat<OwnOptions> {
  static constexpr std::string_view name = "own";
  static constexpr auto options() { return std::array<nearfar::LineOption<OwnOptions>, 0>{}; }
};
#endif

nearfar::AnyAttention<float, Own> attention() { return {{.dim = 1}, "own"}; }
