#pragma once

#include <nearfar/line_format.hpp>

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// What training and streaming keep for a mechanism: a type for each, so that a variant of them has no type twice, and
// an empty one where the mechanism keeps nothing.
template <class M>
struct SavedOf {};
template <DifferentiableAttention M>
struct SavedOf<M> {
  typename M::Saved saved;
};

template <class M>
struct StateOf {};
template <StreamingAttention M>
struct StateOf<M> {
  typename M::State state;
};

template <class M>
concept ChosenByLine = Attention<M> && requires {
  typename M::Options;
} && requires(const M& mechanism, const Heads& heads, const typename M::Options& options) {
  M(heads, options);
  { mechanism.options() } -> std::convertible_to<const typename M::Options&>;
  { LineFormat<typename M::Options>::name } -> std::convertible_to<std::string_view>;
  LineFormat<typename M::Options>::options();
};

}  // namespace detail

/// One of several mechanisms, chosen at run time by a line of text, so that an experiment names it in a file:
///
///   AnyAttention<float> attention(heads, "multipole:block=64,rank=4,causal");
///
/// A line is the name of a mechanism and, after a colon, the options that it sets, with commas between them. An option
/// that is on or off may be named alone for on; none unsets one that need not be set. Names and values are those of the
/// mechanism's Options, as the tables of line_format.hpp give them; the others keep their defaults.
///
/// It is itself Attention, DifferentiableAttention if all its mechanisms are, and StreamingAttention if one is. A call
/// costs one branch more than that of the mechanism that is held.
template <class... Mechanisms>
class AnyAttentionOf {
  static_assert(
      (detail::ChosenByLine<Mechanisms> && ...),
      "nearfar: a mechanism of AnyAttention is an Attention with a type Options, a constructor from heads and "
      "options, options() const, and a specialisation of nearfar::LineFormat for its Options.");

  static constexpr bool differentiable = (DifferentiableAttention<Mechanisms> && ...);
  static constexpr bool streaming = (StreamingAttention<Mechanisms> || ...);

 public:
  using Scalar = typename std::tuple_element_t<0, std::tuple<Mechanisms...>>::Scalar;
  static_assert((std::same_as<typename Mechanisms::Scalar, Scalar> && ...),
                "nearfar: the mechanisms of AnyAttention have one scalar type, and these have different ones.");

  /// What backward needs of the mechanism that ran forward.
  struct Saved {
    std::variant<std::monostate, detail::SavedOf<Mechanisms>...> of;
  };

  /// The parameters of the mechanism that is held, where they stand in it. A copy stands by itself: to keep, or to add
  /// gradients up in.
  class Parameters {
   public:
    template <class Visit>
    void for_each(Visit&& visit) {
      std::visit([&](auto& mechanism) { mechanism.parameters().for_each(visit); }, mechanism_);
    }
    template <class Visit>
    void for_each(Visit&& visit) const {
      std::visit([&](const auto& mechanism) { mechanism.parameters().for_each(visit); }, mechanism_);
    }

   private:
    friend AnyAttentionOf;
    explicit Parameters(std::variant<Mechanisms...> mechanism) : mechanism_(std::move(mechanism)) {}

    std::variant<Mechanisms...> mechanism_;
  };

  /// What a stream of the mechanism that started it remembers.
  struct State {
    std::variant<std::monostate, detail::StateOf<Mechanisms>...> of;
    Index tokens = 0;  ///< seen so far
  };

  /// Throws std::invalid_argument if the line names a mechanism or an option that is not known, an option twice, or a
  /// value that is none; and what the mechanism throws for these heads and options.
  AnyAttentionOf(const Heads& heads, std::string_view line) : AnyAttentionOf(heads, detail::cut_line(line)) {}

  /// Holds a mechanism that is already made. Its line sets the options that differ from their defaults; that of a
  /// mechanism with the user's own feature maps cannot be read again.
  template <class M>
  requires(std::same_as<M, Mechanisms> || ...) explicit AnyAttentionOf(M mechanism) : held_(std::move(mechanism)) {
    const auto& options = std::get<M>(held_.mechanism_).options();
    line_ = print(options, detail::names_of_changed(options, table_of(options)));
  }

  /// The name of the mechanism that is held: "multipole".
  std::string_view name() const {
    return visit([](const auto& mechanism) { return name_of(mechanism.options()); });
  }

  /// The line that makes the same again: it sets what was set, in that order, without blanks and every value in one
  /// form (0.001 for 1e-3). Read again, it comes back as it was.
  const std::string& line() const { return line_; }

  /// f(mechanism), of the mechanism that is held.
  template <class F>
  decltype(auto) visit(F&& f) const {
    return std::visit(std::forward<F>(f), held_.mechanism_);
  }

  Heads heads() const {
    return visit([](const auto& mechanism) -> Heads { return mechanism.heads(); });
  }

  const Parameters& parameters() const requires differentiable { return held_; }
  Parameters& parameters() requires differentiable { return held_; }

  void forward(const Inputs<Scalar>& inputs, Tokens<Scalar> out, Context& context = default_context()) const {
    visit([&](const auto& mechanism) { nearfar::forward(mechanism, inputs, out, context); });
  }

  void forward(const Inputs<Scalar>& inputs, Tokens<Scalar> out, Saved& saved,
               Context& context = default_context()) const requires differentiable {
    visit([&]<class M>(const M& mechanism) {
      // What another mechanism saved stays until this one has found no fault with the inputs.
      auto* const held = std::get_if<detail::SavedOf<M>>(&saved.of);
      detail::SavedOf<M> fresh;
      nearfar::forward(mechanism, inputs, out, held ? held->saved : fresh.saved, context);
      if (held == nullptr) saved.of = std::move(fresh);
    });
  }

  /// Throws std::invalid_argument if `saved` or `grad_parameters` come from another mechanism.
  void backward(const Inputs<Scalar>& inputs, Tokens<const Scalar> out, const Saved& saved,
                Tokens<const Scalar> grad_out, const InputGradients<Scalar>& grad_inputs, Parameters& grad_parameters,
                Context& context = default_context()) const requires differentiable {
    visit([&]<class M>(const M& mechanism) {
      const auto& held = part<detail::SavedOf<M>>(saved.of, "saved");
      require_own(std::holds_alternative<M>(grad_parameters.mechanism_), "grad_parameters",
                  grad_parameters.mechanism_.index());
      auto&& gradients = std::get<M>(grad_parameters.mechanism_).parameters();
      nearfar::backward(mechanism, inputs, out, held.saved, grad_out, grad_inputs, gradients, context);
    });
  }

  /// With room for so many tokens, where the mechanism makes room. Throws std::invalid_argument if the mechanism that
  /// is held cannot be streamed.
  State start(Index room = 0) const requires streaming {
    detail::require(room >= 0, detail::any_attention_name, "room must be 0 or more, but is ", room, ".");
    return visit([&]<class M>(const M& mechanism) -> State {
      require_streaming<M>();
      if constexpr (StreamingAttention<M>) return {detail::StateOf<M>{nearfar::start(mechanism, room)}};
      return {};
    });
  }

  /// Throws std::invalid_argument if `state` comes from another mechanism.
  void extend(State& state, const Inputs<Scalar>& inputs, Tokens<Scalar> out,
              Context& context = default_context()) const requires streaming {
    visit([&]<class M>(const M& mechanism) {
      require_streaming<M>();
      auto& held = part<detail::StateOf<M>>(state.of, "state");
      if constexpr (StreamingAttention<M>) nearfar::extend(mechanism, held.state, inputs, out, context);
    });
    state.tokens += inputs.query.rows();
  }

  /// Takes a stream of Softmax or Banded back to where it had seen `tokens` tokens, as they do. Throws
  /// std::invalid_argument if the mechanism that is held cannot do that: then keep a copy of the state.
  void rewind(State& state, Index tokens) const requires streaming {
    visit([&]<class M>(const M& mechanism) {
      require_streaming<M>();
      auto& held = part<detail::StateOf<M>>(state.of, "state");
      if constexpr (requires { mechanism.rewind(held.state, tokens); }) {
        mechanism.rewind(held.state, tokens);
      } else {
        detail::refuse(detail::any_attention_name, {name(), " cannot be rewound, to ", tokens, " of ", state.tokens,
                                                    " tokens: keep a copy of the state."});
      }
    });
    state.tokens = tokens;
  }

 private:
  AnyAttentionOf(const Heads& heads, const detail::OptionLine& line) : held_(make(heads, line)) {
    line_ = visit([&](const auto& mechanism) { return print(mechanism.options(), detail::names_of(line.options)); });
  }

  template <class M>
  void require_streaming() const {
    detail::require(StreamingAttention<M>, detail::any_attention_name, name(), " cannot be streamed.");
  }

  /// That `argument` is of the mechanism that is held; it is of mechanism number `index`, if that is one.
  void require_own(bool own, std::string_view argument, std::size_t index) const {
    constexpr std::array names{LineFormat<typename Mechanisms::Options>::name...};
    const bool filled = index < names.size();
    detail::require(own, detail::any_attention_name, argument, " must come from ", name(),
                    filled ? ", but comes from " : ", but is empty", filled ? names[index] : "", ".");
  }

  /// What a Saved or State keeps of the mechanism that is held.
  template <class Of, class Kept>
  auto& part(Kept& kept, std::string_view argument) const {
    require_own(std::holds_alternative<Of>(kept), argument, kept.index() - 1);
    return std::get<Of>(kept);
  }

  template <class Options>
  static std::string_view name_of(const Options&) {
    return LineFormat<Options>::name;
  }

  template <class Options>
  static std::span<const LineOption<Options>> table_of(const Options&) {
    static constexpr auto table = LineFormat<Options>::options();
    return table;
  }

  template <class Options>
  static std::string print(const Options& options, const std::vector<std::string_view>& names) {
    return detail::print_line(name_of(options), names, options, table_of(options));
  }

  static std::variant<Mechanisms...> make(const Heads& heads, const detail::OptionLine& line) {
    std::optional<std::variant<Mechanisms...>> made;
    const auto make_if_named = [&]<class M>(std::type_identity<M>) {
      using Options = typename M::Options;
      if (line.mechanism != LineFormat<Options>::name) return;
      made.emplace(M(heads, detail::read_options<Options>(line, table_of(Options{}))));
    };
    (make_if_named(std::type_identity<Mechanisms>{}), ...);
    detail::require(made.has_value(), detail::any_attention_name, "unknown mechanism \"", line.mechanism,
                    "\"; known are ", detail::joined(std::array{LineFormat<typename Mechanisms::Options>::name...}),
                    ".");
    return *std::move(made);
  }

  Parameters held_;
  std::string line_;
};

/// All of nearfar's mechanisms and any of your own: those need Options, a constructor from heads and options,
/// options(), and a LineFormat of the Options.
template <class Scalar, class... Own>
using AnyAttention = AnyAttentionOf<Softmax<Scalar>, Banded<Scalar>, Linear<Scalar>, Nystrom<Scalar>, Fmm<Scalar>,
                                    Additive<Scalar>, Multipole<Scalar>, Own...>;

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
