#pragma once

#include <nearfar/additive.hpp>
#include <nearfar/banded.hpp>
#include <nearfar/detail/option_line.hpp>
#include <nearfar/fmm.hpp>
#include <nearfar/linear.hpp>
#include <nearfar/multipole.hpp>
#include <nearfar/nystrom.hpp>
#include <nearfar/softmax.hpp>

#include <array>
#include <concepts>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

template <>
inline constexpr std::array<std::string_view, 2> enumerator_names<Normalizer>{"row_sum", "sqrt_length"};

template <>
inline constexpr std::array<std::string_view, 2> enumerator_names<Gate>{"sigmoid", "identity"};

template <>
inline constexpr std::array<std::string_view, 3> enumerator_names<BlendWeights>{"per_feature", "per_head", "shared"};

template <>
inline constexpr std::array<std::string_view, 3> enumerator_names<Pooling>{"average", "grouped_convolution",
                                                                           "hierarchical_convolution"};

template <>
inline constexpr std::array<std::string_view, 2> enumerator_names<QueryPooling>{"unmasked", "all"};

namespace detail {

/// Feature maps by their names: elu+tanh.
template <std::same_as<AnyFeatureMap> Map>
struct ValueText<std::vector<Map>> {
  static std::string expected() { return "feature maps joined by + (" + known_feature_map_names<Map>() + ")"; }

  static std::optional<std::vector<Map>> read(std::string_view text) {
    std::vector<Map> maps;
    for (std::optional<std::string_view> rest = text; rest;) {
      const auto [name, further] = cut(*rest, '+');
      const std::optional<Map> map = find_feature_map<Map>(name);
      if (!map) return std::nullopt;
      maps.push_back(*map);
      rest = further;
    }
    return maps;
  }

  static std::string print(const std::vector<Map>& maps) {
    std::vector<std::string_view> names;
    names.reserve(maps.size());
    for (const Map& map : maps) names.push_back(map.name());
    return joined(names, "+");
  }
};

}  // namespace detail

/// How a line of AnyAttention writes the mechanism of these Options: its name, and a table of its options, from which
/// they are read, printed and listed in errors. Specialise it for a mechanism of your own, and enumerator_names for its
/// enumerations. (The tables below are templates so that only a program that reads lines pays for compiling them; yours
/// need not be one.)
template <class Options>
struct LineFormat;

using detail::line_option;
using detail::LineOption;

template <>
struct LineFormat<SoftmaxOptions> {
  static constexpr std::string_view name = "softmax";
  template <class O = SoftmaxOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::causal>("causal"), line_option<&O::scale>("scale")};
  }
};

template <>
struct LineFormat<BandedOptions> {
  static constexpr std::string_view name = "banded";
  template <class O = BandedOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::window, &Window::left>("left"), line_option<&O::window, &Window::right>("right"),
                      line_option<&O::causal>("causal"), line_option<&O::scale>("scale")};
  }
};

template <>
struct LineFormat<LinearOptions> {
  static constexpr std::string_view name = "linear";
  template <class O = LinearOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::feature_maps>("maps"), line_option<&O::causal>("causal"),
                      line_option<&O::normalizer>("normalizer"), line_option<&O::eps>("eps"),
                      line_option<&O::normalize_features>("normalize_features")};
  }
};

template <>
struct LineFormat<NystromOptions> {
  static constexpr std::string_view name = "nystrom";
  template <class O = NystromOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::landmarks>("landmarks"), line_option<&O::scale>("scale"),
                      line_option<&O::tolerance>("tolerance"), line_option<&O::iterations>("iterations")};
  }
};

template <>
struct LineFormat<FmmOptions> {
  static constexpr std::string_view name = "fmm";
  template <class O = FmmOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::window, &Window::left>("left"),
                      line_option<&O::window, &Window::right>("right"),
                      line_option<&O::feature_maps>("maps"),
                      line_option<&O::causal>("causal"),
                      line_option<&O::scale>("scale"),
                      line_option<&O::normalizer>("normalizer"),
                      line_option<&O::eps>("eps"),
                      line_option<&O::normalize_features>("normalize_features"),
                      line_option<&O::gate>("gate"),
                      line_option<&O::weights>("weights")};
  }
};

template <>
struct LineFormat<AdditiveOptions> {
  static constexpr std::string_view name = "additive";
  template <class O = AdditiveOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::causal>("causal"),
                      line_option<&O::scale>("scale"),
                      line_option<&O::per_head_weights>("per_head_weights"),
                      line_option<&O::bias>("bias"),
                      line_option<&O::transform>("transform"),
                      line_option<&O::add_query>("add_query")};
  }
};

template <>
struct LineFormat<MultipoleOptions> {
  static constexpr std::string_view name = "multipole";
  template <class O = MultipoleOptions>
  static constexpr auto options() {
    return std::array{line_option<&O::block>("block"),
                      line_option<&O::rank>("rank"),
                      line_option<&O::causal>("causal"),
                      line_option<&O::mass_scaling>("mass_scaling"),
                      line_option<&O::pooling>("pooling"),
                      line_option<&O::pooled_queries>("pooled_queries"),
                      line_option<&O::query_pooling>("query_pooling"),
                      line_option<&O::scale>("scale"),
                      line_option<&O::levels>("levels")};
  }
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
