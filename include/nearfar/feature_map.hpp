#pragma once

#include <nearfar/detail/errors.hpp>
#include <nearfar/detail/exp.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// A feature map phi of linear attention: a function of one number, its derivative, each for float and double, and a
/// name of lower-case letters, digits and underscores, which no other map has. Linear attention applies it to every
/// entry of query and key. A map whose functions also take and give Eigen's packets of numbers, as those below do by
/// the packet functions of detail/simd.hpp, says so by a static `on_packets` that is true: it is faster.
template <class Map>
concept FeatureMap = requires(const Map& map, float x, double y) {
  { Map::name } -> std::convertible_to<std::string_view>;
  { map.value(x) } -> std::convertible_to<float>;
  { map.value(y) } -> std::same_as<double>;
  { map.derivative(x) } -> std::convertible_to<float>;
  { map.derivative(y) } -> std::same_as<double>;
};

namespace detail {

// The maps below are written once, for a number or for a packet of numbers (V).
template <class V>
using LaneOf = typename Eigen::internal::unpacket_traits<V>::type;

template <class V>
NEARFAR_INLINE V constant(double value) {
  return pset1<V>(static_cast<LaneOf<V>>(value));
}

/// e^x for x <= 0.
template <class V>
NEARFAR_INLINE V exp_nonpositive(const V& x) {
  if constexpr (std::floating_point<V>) {
    return std::exp(x);
  } else {
    return exp2<LaneOf<V>>(pmul(x, constant<V>(log2_e<double>)));
  }
}

/// 1 / (1 + e^-x), from the exponential that cannot overflow.
template <class V>
NEARFAR_INLINE V logistic(const V& x) {
  const V one = constant<V>(1);
  const V small = exp_nonpositive(pnegate(pabs(x)));
  return pdiv(pselect(pcmp_lt(x, constant<V>(0)), small, one), padd(one, small));
}

/// log(1 + x) for x >= 0: the quotient makes up for what is lost of x when 1 is added (Kahan).
template <class V>
NEARFAR_INLINE V log_one_plus(const V& x) {
  if constexpr (std::floating_point<V>) {
    return std::log1p(x);
  } else {
    const V one = constant<V>(1);
    const V sum = padd(one, x);
    return pselect(pcmp_eq(sum, one), x, pmul(x, pdiv(plog(sum), psub(sum, one))));
  }
}

}  // namespace detail

/// The feature maps of the FMMformer paper and its code (arXiv 2108.02347), and further common ones.
namespace feature_map {

using namespace detail;

/// elu(x) + 1: x + 1 above zero, e^x below.
struct Elu {
  static constexpr std::string_view name = "elu";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return padd(derivative(x), pmax(x, constant<V>(0)));
  }
  template <class V>
  V derivative(const V& x) const {
    return exp_nonpositive<V>(pmin(x, constant<V>(0)));
  }
};

/// elu(-x) + 1.
struct EluFlip {
  static constexpr std::string_view name = "elu_flip";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return Elu{}.value<V>(pnegate(x));
  }
  template <class V>
  V derivative(const V& x) const {
    return pnegate(Elu{}.derivative<V>(pnegate(x)));
  }
};

/// tanh(x) + 1, which is 2 sigmoid(2 x).
struct Tanh {
  static constexpr std::string_view name = "tanh";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return pmul(constant<V>(2), logistic<V>(padd(x, x)));
  }
  template <class V>
  V derivative(const V& x) const {
    const V up = logistic<V>(padd(x, x));
    const V down = logistic<V>(pnegate(padd(x, x)));
    return pmul(constant<V>(4), pmul(up, down));
  }
};

/// max(x, 0). Its derivative at 0 is 0.
struct Relu {
  static constexpr std::string_view name = "relu";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return pmax(x, constant<V>(0));
  }
  template <class V>
  V derivative(const V& x) const {
    return pselect(pcmp_lt(constant<V>(0), x), constant<V>(1), constant<V>(0));
  }
};

/// 1 / (1 + e^-x).
struct Sigmoid {
  static constexpr std::string_view name = "sigmoid";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return logistic(x);
  }
  template <class V>
  V derivative(const V& x) const {
    return pmul(logistic(x), logistic<V>(pnegate(x)));
  }
};

/// log(1 + e^x).
struct Softplus {
  static constexpr std::string_view name = "softplus";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return padd(pmax(x, constant<V>(0)), log_one_plus(exp_nonpositive<V>(pnegate(pabs(x)))));
  }
  template <class V>
  V derivative(const V& x) const {
    return logistic(x);
  }
};

/// x itself: attention by plain inner products. Its row sums may be zero or negative.
struct Identity {
  static constexpr std::string_view name = "identity";
  static constexpr bool on_packets = true;

  template <class V>
  V value(const V& x) const {
    return x;
  }
  template <class V>
  V derivative(const V&) const {
    return constant<V>(1);
  }
};

}  // namespace feature_map

/// Any feature map, chosen at run time and applied to whole matrices at once. Copies share the map.
class AnyFeatureMap {
 public:
  template <class Map>
  requires(FeatureMap<Map> && !std::same_as<Map, AnyFeatureMap>) AnyFeatureMap(Map map)
      : model_(std::make_shared<const Model<Map>>(std::move(map))) {}

  template <class Map>
  requires(!FeatureMap<Map> && (requires(const Map& map, float x) { map.value(x); } || std::invocable<Map, float> ||
                                std::convertible_to<Map, std::string_view>)) AnyFeatureMap(const Map&) {
    static_assert(detail::never<Map>,
                  "nearfar: a feature map needs value(x) and derivative(x) const, for float and double, and a static "
                  "name: it is no function, and one of a name is feature_map_from_name(name).");
  }

  std::string_view name() const { return model_->name(); }

  /// to(r, c) = phi(from(r, c)) for a rows x cols matrix; `to` may be `from`.
  template <class T>
  void value(const T* from, Index from_stride, Index rows, Index cols, T* to, Index to_stride) const {
    model_->value(from, from_stride, rows, cols, to, to_stride);
  }

  /// gradient(r, c) *= phi'(x(r, c)) for a rows x cols matrix.
  template <class T>
  void chain(const T* x, Index x_stride, Index rows, Index cols, T* gradient, Index gradient_stride) const {
    model_->chain(x, x_stride, rows, cols, gradient, gradient_stride);
  }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual std::string_view name() const = 0;
    virtual void value(const float*, Index, Index, Index, float*, Index) const = 0;
    virtual void value(const double*, Index, Index, Index, double*, Index) const = 0;
    virtual void chain(const float*, Index, Index, Index, float*, Index) const = 0;
    virtual void chain(const double*, Index, Index, Index, double*, Index) const = 0;
  };

  template <class Map>
  struct Model final : Interface {
    explicit Model(Map map) : map_(std::move(map)) {}

    std::string_view name() const override { return Map::name; }
    void value(const float* x, Index xs, Index rows, Index cols, float* y, Index ys) const override {
      for_each_entry(x, xs, rows, cols, y, ys, ToValue<Map>{map_});
    }
    void value(const double* x, Index xs, Index rows, Index cols, double* y, Index ys) const override {
      for_each_entry(x, xs, rows, cols, y, ys, ToValue<Map>{map_});
    }
    void chain(const float* x, Index xs, Index rows, Index cols, float* y, Index ys) const override {
      for_each_entry(x, xs, rows, cols, y, ys, TimesDerivative<Map>{map_});
    }
    void chain(const double* x, Index xs, Index rows, Index cols, double* y, Index ys) const override {
      for_each_entry(x, xs, rows, cols, y, ys, TimesDerivative<Map>{map_});
    }

    Map map_;
  };

  template <class Map>
  struct ToValue {
    const Map& map;
    template <class V>
    V operator()(const V& x, const V&) const {
      return static_cast<V>(map.value(x));
    }
  };

  template <class Map>
  struct TimesDerivative {
    const Map& map;
    template <class V>
    V operator()(const V& x, const V& y) const {
      return detail::pmul(static_cast<V>(map.derivative(x)), y);
    }
  };

  /// y = f(x, y) for every entry. The ends of rows that fill no vector are put side by side into some that they do, so
  /// that an entry's result does not depend on its place.
  template <class T, template <class> class Function, class Map>
  static void for_each_entry(const T* x, Index x_stride, Index rows, Index cols, T* y, Index y_stride,
                             Function<Map> function) {
    if constexpr (requires { requires Map::on_packets; }) {
      constexpr Index width = detail::lanes<T>;
      const Index end = cols % width;
      for_each_vector(x, x_stride, rows, cols - end, y, y_stride, function);
      if (end == 0) return;
      std::array<T, 8 * width> ends_x{}, ends_y{};
      for (Index r = 0, count; r < rows; r += count) {
        count = std::min(rows - r, std::ssize(ends_x) / end);
        const auto copy = [count, end](const T* from, Index from_stride, T* to, Index to_stride) {
          for (Index i = 0; i < count; ++i) {
            for (Index c = 0; c < end; ++c) to[i * to_stride + c] = from[i * from_stride + c];
          }
        };
        T* const to = y + r * y_stride + cols - end;
        copy(x + r * x_stride + cols - end, x_stride, ends_x.data(), end);
        copy(to, y_stride, ends_y.data(), end);
        for_each_vector(ends_x.data(), 0, 1, detail::round_up(count * end, width), ends_y.data(), 0, function);
        copy(ends_y.data(), end, to, y_stride);
      }
    } else {
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < cols; ++c) y[r * y_stride + c] = function(x[r * x_stride + c], y[r * y_stride + c]);
      }
    }
  }

  /// The same of whole vectors.
  template <class T, class Function>
  NEARFAR_NO_INLINE static void for_each_vector(const T* x, Index x_stride, Index rows, Index cols, T* y,
                                                Index y_stride, Function function) {
    using P = detail::Packet<T>;
    for (Index r = 0; r < rows; ++r) {
      const T* from = x + r * x_stride;
      T* to = y + r * y_stride;
      for (Index c = 0; c < cols; c += detail::lanes<T>) {
        detail::pstoreu(to + c, function(detail::ploadu<P>(from + c), detail::ploadu<P>(to + c)));
      }
    }
  }

  std::shared_ptr<const Interface> model_;
};

namespace detail {

template <std::same_as<AnyFeatureMap> Map>
const auto& known_feature_maps() {
  using namespace feature_map;
  static const std::array<Map, 7> known = {Elu{}, EluFlip{}, Tanh{}, Relu{}, Sigmoid{}, Softplus{}, Identity{}};
  return known;
}

template <std::same_as<AnyFeatureMap> Map>
std::optional<Map> find_feature_map(std::string_view name) {
  for (const Map& map : known_feature_maps<Map>()) {
    if (map.name() == name) return map;
  }
  return std::nullopt;
}

template <std::same_as<AnyFeatureMap> Map>
std::string known_feature_map_names() {
  std::string names;
  for (const Map& map : known_feature_maps<Map>()) {
    names += names.empty() ? "" : ", ";
    names += map.name();
  }
  return names;
}

}  // namespace detail

/// The built-in feature map of that name. Throws std::invalid_argument, listing the known names, if there is none. (A
/// template so that only a program that asks for a name pays for compiling them all.)
template <std::same_as<AnyFeatureMap> Map = AnyFeatureMap>
Map feature_map_from_name(std::string_view name) {
  const std::optional<Map> map = detail::find_feature_map<Map>(name);
  detail::require(map.has_value(), "feature_map_from_name", "unknown feature map \"", name, "\"; known are ",
                  map ? "" : detail::known_feature_map_names<Map>(), ".");
  return *map;
}

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
