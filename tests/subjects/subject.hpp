#pragma once

#include <nearfar/attention.hpp>

#include "support/random.hpp"
#include "support/sample.hpp"

#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <ostream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace nearfar::test {

/// An attention of any mechanism, known by its scalar type alone, so that the tests of what holds for all mechanisms
/// are compiled once and each mechanism once.
template <class T>
class Subject {
 public:
  using Scalar = T;

  virtual ~Subject() = default;
  virtual Heads heads() const = 0;
  virtual void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context) const = 0;

  /// False where the mechanism has no backward pass; then `train` must not be called.
  virtual bool can_be_trained() const = 0;

  /// Forward with saving, then backward; the gradients of parameters start from 0 and are found by
  /// `each_parameter_gradient`.
  virtual void train(const Inputs<T>& inputs, Tokens<T> out, Tokens<const T> grad_out,
                     const InputGradients<T>& gradients, Context& context) = 0;

  /// False where the mechanism has no stream with these options; then `start` and `extend` must not be called.
  virtual bool can_stream() const = 0;

  /// Begins a stream anew, with room for so many tokens where the mechanism makes room; and appends tokens to it.
  virtual void start(Index room = 0) = 0;
  virtual void extend(const Inputs<T>& inputs, Tokens<T> out, Context& context) = 0;

  /// A copy, its stream where this one's stands.
  virtual std::unique_ptr<Subject> copy() const = 0;

  using Visit = std::function<void(const std::string& name, Matrix<T>& matrix)>;
  virtual void each_parameter(const Visit& visit) = 0;
  virtual void each_parameter_gradient(const Visit& visit) = 0;
};

/// Everything that training writes: "out", the gradients "query", "key" and "value", and those of the parameters by
/// name.
template <class T>
std::map<std::string, Matrix<T>> train(Subject<T>& subject, const Sample<T>& sample, const Matrix<T>& grad_out,
                                       int threads = 1) {
  const auto unwritten = [](Index rows, Index cols) -> Matrix<T> {
    return Matrix<T>::Constant(rows, cols, std::numeric_limits<T>::quiet_NaN());
  };
  Matrix<T> out = unwritten(grad_out.rows(), grad_out.cols());
  Matrix<T> query = unwritten(sample.query.rows(), sample.query.cols());
  Matrix<T> key = unwritten(sample.key.rows(), sample.key.cols());
  Matrix<T> value = unwritten(sample.value.rows(), sample.value.cols());
  Context context(threads);
  subject.train(sample.inputs(), out, grad_out, {query, key, value}, context);
  std::map<std::string, Matrix<T>> written{{"out", out}, {"query", query}, {"key", key}, {"value", value}};
  subject.each_parameter_gradient([&](const std::string& name, Matrix<T>& matrix) { written[name] = matrix; });
  return written;
}

/// One configuration of one mechanism, and what is known about it.
struct SubjectCase {
  std::string name;

  bool causal = false;
  /// n_q may differ from n_k, and the value width from the key width.
  bool any_shape = false;
  /// Masked keys at the end change nothing for the tokens before: false where n itself, or a masked token's query,
  /// enters the result.
  bool padding_is_shortening = true;
  /// The result of a masked token reads its own value (Additive), and is not zero where all keys are masked.
  bool masked_token_reads_itself = false;
  /// A score of -infinity, where key features are -infinity, is part of the definition.
  bool takes_infinite_scores = false;
  /// Relative errors against the reference.
  double tolerance = 1e-12;
  double float_tolerance = 2e-5;
  /// The error of float over 8192 keys of 64 features of unit variance, relative to a row's largest entry.
  double accuracy = 2e-6;

  std::function<std::unique_ptr<Subject<double>>(const Heads&)> in_double = {};
  std::function<std::unique_ptr<Subject<float>>(const Heads&)> in_float = {};
  /// out by reference.hpp, for an attention that in_double made.
  std::function<Matrix<double>(const Subject<double>&, const Inputs<double>&)> reference = {};

  template <class T>
  std::unique_ptr<Subject<T>> make(const Heads& heads) const {
    if constexpr (std::is_same_v<T, double>) {
      return in_double(heads);
    } else {
      return in_float(heads);
    }
  }
};

inline std::ostream& operator<<(std::ostream& stream, const SubjectCase& subject) { return stream << subject.name; }

/// All configurations. The file subjects/<mechanism>.cpp adds its own.
inline std::vector<SubjectCase>& subject_cases() {
  static std::vector<SubjectCase> cases;
  return cases;
}

/// For INSTANTIATE_TEST_SUITE_P(All, ..., ValuesIn(subject_cases()), subject_name).
inline std::string subject_name(const ::testing::TestParamInfo<SubjectCase>& info) { return info.param.name; }

/// What a mechanism keeps between calls, or nothing where it keeps nothing.
struct Nothing {};
template <class A>
struct SavedOf {
  using type = Nothing;
};
template <DifferentiableAttention A>
struct SavedOf<A> {
  using type = typename A::Saved;
};
template <class A>
struct StateOf {
  using type = Nothing;
};
template <StreamingAttention A>
struct StateOf<A> {
  using type = typename A::State;
};

/// A Subject made of an attention.
template <class A>
class SubjectOf final : public Subject<typename A::Scalar> {
  using T = typename A::Scalar;

 public:
  explicit SubjectOf(A attention) : attention_(std::move(attention)) {}

  const A& attention() const { return attention_; }

  Heads heads() const override { return attention_.heads(); }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context) const override {
    attention_.forward(inputs, out, context);
  }

  bool can_be_trained() const override { return DifferentiableAttention<A>; }

  void train([[maybe_unused]] const Inputs<T>& inputs, [[maybe_unused]] Tokens<T> out,
             [[maybe_unused]] Tokens<const T> grad_out, [[maybe_unused]] const InputGradients<T>& gradients,
             [[maybe_unused]] Context& context) override {
    if constexpr (DifferentiableAttention<A>) {
      attention_.forward(inputs, out, saved_, context);
      grad_parameters_.for_each([](const auto&, auto& matrix) { matrix.setZero(); });
      attention_.backward(inputs, out, saved_, grad_out, gradients, grad_parameters_, context);
    }
  }

  bool can_stream() const override {
    if constexpr (StreamingAttention<A>) {
      try {
        attention_.start();
        return true;
      } catch (const std::invalid_argument&) {
      }
    }
    return false;
  }

  void start([[maybe_unused]] Index room) override {
    if constexpr (requires { attention_.start(room); }) {
      state_ = attention_.start(room);
    } else if constexpr (StreamingAttention<A>) {
      state_ = attention_.start();
    }
  }

  void extend([[maybe_unused]] const Inputs<T>& inputs, [[maybe_unused]] Tokens<T> out,
              [[maybe_unused]] Context& context) override {
    if constexpr (StreamingAttention<A>) attention_.extend(state_, inputs, out, context);
  }

  std::unique_ptr<Subject<T>> copy() const override { return std::make_unique<SubjectOf>(*this); }

  void each_parameter(const typename Subject<T>::Visit& visit) override { attention_.parameters().for_each(visit); }
  void each_parameter_gradient(const typename Subject<T>::Visit& visit) override { grad_parameters_.for_each(visit); }

 private:
  A attention_;
  typename SavedOf<A>::type saved_{};
  typename StateOf<A>::type state_{};
  typename A::Parameters grad_parameters_ = attention_.parameters();
};

/// Adds a configuration of a mechanism: `known` says what is known about it, `options` are the mechanism's own, and
/// `reference(attention, inputs)` gives out by reference.hpp. Parameters are filled with the same random numbers
/// whatever the scalar type.
template <template <class> class Mechanism, class Reference>
bool add_subject(SubjectCase known, const typename Mechanism<double>::Options& options, Reference reference) {
  const auto make = [options]<class T>(const Heads& heads, std::type_identity<T>) {
    Mechanism<T> attention(heads, options);
    Random random(17);
    attention.parameters().for_each(
        [&](const auto&, Matrix<T>& matrix) { matrix = random.matrix<T>(matrix.rows(), matrix.cols(), 0.5); });
    return std::make_unique<SubjectOf<Mechanism<T>>>(std::move(attention));
  };
  known.in_double = [make](const Heads& heads) { return make(heads, std::type_identity<double>{}); };
  known.in_float = [make](const Heads& heads) { return make(heads, std::type_identity<float>{}); };
  known.reference = [reference](const Subject<double>& subject, const Inputs<double>& inputs) -> Matrix<double> {
    return reference(static_cast<const SubjectOf<Mechanism<double>>&>(subject).attention(), inputs);
  };
  subject_cases().push_back(std::move(known));
  return true;
}

}  // namespace nearfar::test
