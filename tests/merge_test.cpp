#include <nearfar/merge.hpp>
#include <nearfar/softmax.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/sample.hpp"

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace nearfar::test {
namespace {

const Heads heads{.query = 4, .key_value = 2, .dim = 5, .value_dim = 7};
constexpr double none = -std::numeric_limits<double>::infinity();

// A PartialAttention that owns its memory.
template <class T>
struct Part {
  Matrix<T> out;
  Matrix<double> log_sum_exp;

  PartialAttention<const T> read() const { return {out, log_sum_exp}; }
  PartialAttention<T> write() { return {out, log_sum_exp}; }
};

template <class T>
Part<T> unwritten(Index n) {
  return {Matrix<T>::Constant(n, heads.out_cols(), std::numeric_limits<T>::quiet_NaN()),
          Matrix<double>::Constant(heads.query, n, std::numeric_limits<double>::quiet_NaN())};
}

template <class T>
Part<T> random_part(Index n, std::uint64_t seed) {
  Random random(seed);
  return {random.matrix<T>(n, heads.out_cols()), random.matrix<double>(heads.query, n)};
}

template <class T>
Part<T> merged(const Part<T>& a, const Part<T>& b, int threads = 1) {
  Part<T> result = unwritten<T>(a.out.rows());
  Context context(threads);
  merge<T>(heads, a.read(), b.read(), result.write(), context);
  return result;
}

template <class T>
struct PartGradients {
  Part<T> a, b;
};

template <class T>
PartGradients<T> merged_backward(const Part<T>& a, const Part<T>& b, const PartialAttention<const T>& grad,
                                 int threads = 1) {
  PartGradients<T> result{unwritten<T>(a.out.rows()), unwritten<T>(a.out.rows())};
  Context context(threads);
  merge_backward<T>(heads, a.read(), b.read(), grad, result.a.write(), result.b.write(), context);
  return result;
}

// The keys [first, end) of a sample.
template <class T>
Sample<T> some_keys(const Sample<T>& sample, Index first, Index end) {
  Sample<T> part = sample;
  part.key = sample.key.middleRows(first, end - first);
  part.value = sample.value.middleRows(first, end - first);
  if (!sample.key_mask.empty()) {
    part.key_mask.assign(sample.key_mask.begin() + first, sample.key_mask.begin() + end);
  }
  return part;
}

template <class T>
Part<T> attend(const Sample<T>& sample) {
  typename Softmax<T>::Saved saved;
  Part<T> part = unwritten<T>(sample.query.rows());
  Softmax<T>(heads).forward(sample.inputs(), part.out, saved);
  part.log_sum_exp = saved.log_sum_exp;
  return part;
}

template <class T>
void expect_attention_over_all_keys(double tolerance) {
  for (const Index n_q : {1, 30}) {
    auto sample = random_sample<T>(heads, n_q, 1, 41);
    for (const double hidden : {0.0, 0.5, 1.0}) {
      sample.key_mask = Random(2).mask(41, hidden);
      const Part<T> whole = attend(sample);
      for (const Index first : {0, 1, 20, 41}) {
        const Part<T> both = merged(attend(some_keys(sample, 0, first)), attend(some_keys(sample, first, 41)));
        EXPECT_TRUE(close(both.out, whole.out, tolerance)) << n_q << ", " << hidden << ", " << first;
        EXPECT_TRUE(close(both.log_sum_exp, whole.log_sum_exp, tolerance)) << n_q << ", " << hidden << ", " << first;
      }
    }
  }
}

TEST(Merge, IsAttentionOverTheKeysOfBothInDouble) { expect_attention_over_all_keys<double>(1e-14); }

TEST(Merge, IsAttentionOverTheKeysOfBothInFloat) { expect_attention_over_all_keys<float>(2e-6); }

TEST(Merge, IsAssociative) {
  const auto a = random_part<double>(9, 1), b = random_part<double>(9, 2), c = random_part<double>(9, 3);
  const auto left = merged(merged(a, b), c), right = merged(a, merged(b, c));
  EXPECT_TRUE(close(left.out, right.out, 1e-15));
  EXPECT_TRUE(close(left.log_sum_exp, right.log_sum_exp, 1e-15));
}

TEST(Merge, GivesTheSameIntoOneOfItsParts) {
  const auto a = random_part<float>(300, 1), b = random_part<float>(300, 2);
  const auto expected = merged(a, b, 3);
  auto to = a;
  merge<float>(heads, to.read(), b.read(), to.write());
  EXPECT_TRUE(same_bits(to.out, expected.out));
  EXPECT_TRUE(same_bits(to.log_sum_exp, expected.log_sum_exp));
  to = b;
  merge<float>(heads, a.read(), to.read(), to.write());
  EXPECT_TRUE(same_bits(to.out, expected.out));
  EXPECT_TRUE(same_bits(to.log_sum_exp, expected.log_sum_exp));
}

TEST(Merge, TakesTheOtherPartWhereOneSawNoKey) {
  const auto full = random_part<float>(6, 1);
  auto empty = unwritten<float>(6);
  empty.log_sum_exp.setConstant(none);
  const auto grad = random_part<float>(6, 3);
  for (const bool first : {true, false}) {
    const auto& a = first ? empty : full;
    const auto& b = first ? full : empty;
    EXPECT_TRUE(same_bits(merged(a, b).out, full.out));
    EXPECT_TRUE(same_bits(merged(a, b).log_sum_exp, full.log_sum_exp));
    const auto gradients = merged_backward(a, b, grad.read());
    const auto& of_empty = first ? gradients.a : gradients.b;
    const auto& of_full = first ? gradients.b : gradients.a;
    EXPECT_TRUE(same_bits(of_full.out, grad.out));
    EXPECT_TRUE(same_bits(of_full.log_sum_exp, grad.log_sum_exp));
    EXPECT_EQ(of_empty.out.cwiseAbs().maxCoeff(), 0);
    EXPECT_EQ(of_empty.log_sum_exp.cwiseAbs().maxCoeff(), 0);
  }
}

TEST(Merge, OfTwoPartsThatSawNoKeyIsEmptyAndHasZeroGradients) {
  auto empty = unwritten<double>(3);
  empty.log_sum_exp.setConstant(none);
  const auto both = merged(empty, empty);
  EXPECT_EQ(both.out.cwiseAbs().maxCoeff(), 0);
  EXPECT_TRUE((both.log_sum_exp.array() == none).all());
  const auto gradients = merged_backward(empty, empty, random_part<double>(3, 1).read());
  for (const auto* part : {&gradients.a, &gradients.b}) {
    EXPECT_EQ(part->out.cwiseAbs().maxCoeff(), 0);
    EXPECT_EQ(part->log_sum_exp.cwiseAbs().maxCoeff(), 0);
  }
}

TEST(Merge, AddsWhatIsAddedToAllLogits) {
  for (const double shift : {1e5, -1e5}) {
    const auto a = random_part<double>(9, 1), b = random_part<double>(9, 2), grad = random_part<double>(9, 3);
    auto far_a = a, far_b = b;
    far_a.log_sum_exp.array() += shift;
    far_b.log_sum_exp.array() += shift;
    EXPECT_TRUE(close(merged(far_a, far_b).out, merged(a, b).out, 1e-10));
    EXPECT_TRUE(close(merged(far_a, far_b).log_sum_exp.array() - shift, merged(a, b).log_sum_exp.array(), 1e-10));
    const auto far = merged_backward(far_a, far_b, grad.read()), near = merged_backward(a, b, grad.read());
    EXPECT_TRUE(close(far.a.out, near.a.out, 1e-10));
    EXPECT_TRUE(close(far.b.log_sum_exp, near.b.log_sum_exp, 1e-10));
  }
}

TEST(Merge, TakesTheLargerPartWhereLogitsAreFarApart) {
  auto a = random_part<float>(9, 1), b = random_part<float>(9, 2);
  a.log_sum_exp.array() += 1e5;
  b.log_sum_exp.array() -= 1e5;
  EXPECT_TRUE(same_bits(merged(a, b).out, a.out));
  EXPECT_TRUE(same_bits(merged(b, a).log_sum_exp, a.log_sum_exp));
  const auto grad = random_part<float>(9, 3);
  const auto gradients = merged_backward(a, b, grad.read());
  EXPECT_TRUE(same_bits(gradients.a.out, grad.out));
  EXPECT_TRUE(same_bits(gradients.a.log_sum_exp, grad.log_sum_exp));
  EXPECT_EQ(gradients.b.out.cwiseAbs().maxCoeff(), 0);
}

TEST(Merge, OfNoQueriesIsNothing) {
  const auto empty = random_part<double>(0, 1);
  EXPECT_EQ(merged(empty, empty).out.rows(), 0);
  EXPECT_EQ(merged_backward(empty, empty, empty.read()).a.out.rows(), 0);
}

TEST(Merge, HasTheGradientOfItsDifferences) {
  auto a = random_part<double>(3, 1), b = random_part<double>(3, 2);
  const auto grad = random_part<double>(3, 3);
  for (const bool of_log_sum_exp : {true, false}) {
    const auto loss = [&] {
      const auto both = merged(a, b);
      return grad.out.cwiseProduct(both.out).sum() +
             (of_log_sum_exp ? grad.log_sum_exp.cwiseProduct(both.log_sum_exp).sum() : 0);
    };
    const auto differences = [&](Matrix<double>& of) {
      Matrix<double> result(of.rows(), of.cols());
      for (Index i = 0; i < of.size(); ++i) {
        const double at = of.data()[i], step = 1e-5;
        of.data()[i] = at + step;
        const double above = loss();
        of.data()[i] = at - step;
        result.data()[i] = (above - loss()) / (2 * step);
        of.data()[i] = at;
      }
      return result;
    };
    const auto gradients =
        merged_backward(a, b, of_log_sum_exp ? grad.read() : PartialAttention<const double>{grad.out});
    EXPECT_TRUE(close(gradients.a.out, differences(a.out), 1e-9));
    EXPECT_TRUE(close(gradients.b.out, differences(b.out), 1e-9));
    EXPECT_TRUE(close(gradients.a.log_sum_exp, differences(a.log_sum_exp), 1e-9));
    EXPECT_TRUE(close(gradients.b.log_sum_exp, differences(b.log_sum_exp), 1e-9));
  }
}

// The gradients of a part go on into its own backward pass: together they are those of one pass over all keys.
TEST(Merge, BackwardThroughBothPartsIsBackwardOverAllKeys) {
  const Index n_q = 30, n_k = 41, first = 17;
  const auto sample = random_sample<double>(heads, n_q, 1, n_k);
  const Matrix<double> grad_out = Random(2).matrix<double>(n_q, heads.out_cols());
  const Softmax<double> softmax(heads);
  const auto whole = run_backward(softmax, sample, grad_out);

  const Sample<double> halves[] = {some_keys(sample, 0, first), some_keys(sample, first, n_k)};
  const Part<double> parts[] = {attend(halves[0]), attend(halves[1])};
  const auto gradients = merged_backward(parts[0], parts[1], {grad_out});
  Matrix<double> query = Matrix<double>::Zero(n_q, heads.query_cols()), key(n_k, heads.key_cols());
  Matrix<double> value(n_k, heads.value_cols()), part_query = query;
  for (const Index half : {0, 1}) {
    const auto& grad = half == 0 ? gradients.a : gradients.b;
    const Index begin = half == 0 ? 0 : first, count = half == 0 ? first : n_k - first;
    NoParameters parameters;
    softmax.backward(halves[half].inputs(), parts[half].out, {parts[half].log_sum_exp}, grad.out, grad.log_sum_exp,
                     {part_query, key.middleRows(begin, count), value.middleRows(begin, count)}, parameters);
    query += part_query;
  }
  EXPECT_TRUE(close(query, whole.query, 1e-13));
  EXPECT_TRUE(close(key, whole.key, 1e-13));
  EXPECT_TRUE(close(value, whole.value, 1e-13));
}

TEST(Merge, DoesNotDependOnThreads) {
  const auto a = random_part<float>(1000, 1), b = random_part<float>(1000, 2), grad = random_part<float>(1000, 3);
  EXPECT_TRUE(same_bits(merged(a, b, 3).out, merged(a, b).out));
  const auto one = merged_backward(a, b, grad.read()), three = merged_backward(a, b, grad.read(), 3);
  EXPECT_TRUE(same_bits(three.a.out, one.a.out));
  EXPECT_TRUE(same_bits(three.b.log_sum_exp, one.b.log_sum_exp));
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Merge, RefusesHeadsThatDoNotFitTogether) {
  auto a = random_part<float>(4, 1);
  const Heads odd{.query = 4, .key_value = 3, .dim = 5, .value_dim = 7};
  EXPECT_EQ(message_of([&] { merge<float>(odd, a.read(), a.read(), a.write()); }),
            "nearfar::merge: heads.key_value must divide heads.query, but 3 does not divide 4.");
  EXPECT_EQ(message_of([&] { merge_backward<float>(odd, a.read(), a.read(), a.read(), a.write(), a.write()); }),
            "nearfar::merge_backward: heads.key_value must divide heads.query, but 3 does not divide 4.");
}

TEST(Merge, RefusesGradientsInThePlaceOfWhatTheyAreMadeOf) {
  auto a = random_part<float>(4, 1), b = random_part<float>(4, 2), grad = random_part<float>(4, 3);
  auto grad_a = unwritten<float>(4), grad_b = unwritten<float>(4);
  const auto backward = [&](Part<float>& to_a, Part<float>& to_b) {
    return message_of(
        [&] { merge_backward<float>(heads, a.read(), b.read(), grad.read(), to_a.write(), to_b.write()); });
  };
  EXPECT_EQ(backward(grad, grad_b),
            "nearfar::merge_backward: grad_a.out must be a matrix of its own, but begins where grad_merged.out does.");
  EXPECT_EQ(backward(grad_a, grad),
            "nearfar::merge_backward: grad_b.out must be a matrix of its own, but begins where grad_merged.out does.");
  EXPECT_EQ(backward(grad_a, grad_a),
            "nearfar::merge_backward: grad_b.out must be a matrix of its own, but begins where grad_a.out does.");
  EXPECT_EQ(backward(grad_a, grad_b), "no error");
}

TEST(Merge, RefusesShapesThatDisagree) {
  auto a = random_part<float>(4, 1), b = random_part<float>(5, 2), c = random_part<float>(4, 3);
  EXPECT_EQ(message_of([&] { merge<float>(heads, a.read(), b.read(), a.write()); }),
            "nearfar::merge: b.out has 5 rows, but a.out has 4.");
  c.log_sum_exp.resize(3, 4);
  EXPECT_EQ(message_of([&] { merge<float>(heads, a.read(), c.read(), a.write()); }),
            "nearfar::merge: b.log_sum_exp is 3 x 4, but these heads and queries need 4 x 4.");
  EXPECT_EQ(message_of([&] { merge_backward<float>(heads, a.read(), a.read(), b.read(), a.write(), a.write()); }),
            "nearfar::merge_backward: grad_merged.out has 5 rows, but a.out has 4.");
  const Softmax<float> softmax(heads);
  const auto sample = random_sample<float>(heads, 4, 1);
  Softmax<float>::Saved saved;
  Matrix<float> out(4, heads.out_cols()), query = sample.query, key = sample.key, value = sample.value;
  NoParameters parameters;
  softmax.forward(sample.inputs(), out, saved);
  EXPECT_EQ(message_of([&] {
              softmax.backward(sample.inputs(), out, saved, out, b.log_sum_exp, {query, key, value}, parameters);
            }),
            "nearfar::Softmax: grad_log_sum_exp is 4 x 5, but these heads and queries need 4 x 4.");
}

}  // namespace
}  // namespace nearfar::test
