#include "subjects/properties.hpp"

// Inputs and results may lie anywhere: inside larger matrices, at any address, with any distance between rows.

namespace nearfar::test {
namespace {

class Views : public Property {};

INSTANTIATE_TEST_SUITE_P(All, Views, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Views, ScatteredRowsGiveTheSameBits) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 18, 135}) {
      const auto sample = masked_sample<T>(n, 800);
      const Matrix<T> expected = run_forward(*subject, sample);
      Scattered<T> query(sample.query), key(sample.key), value(sample.value);
      Scattered<T> out(Matrix<T>::Zero(expected.rows(), expected.cols()));
      Inputs<T> inputs{query.view(), key.view(), value.view(), sample.key_mask};
      Context context(2);
      subject->forward(inputs, out.view(), context);
      EXPECT_TRUE(same_bits(out.view(), expected)) << n;
      EXPECT_TRUE(out.is_intact()) << "forward wrote beside out, n = " << n;
    }
  });
}

TEST_P(Views, OneProjectionMayHoldQueryKeyAndValueSideBySide) {
  const Heads heads{.query = 3, .key_value = 3, .dim = 4};
  const auto subject = make<float>(heads);
  const Matrix<float> together = Random(810).matrix<float>(50, 3 * 12);
  const Matrix<float> query = together.leftCols(12), key = together.middleCols(12, 12), value = together.rightCols(12);
  Matrix<float> larger = Matrix<float>::Zero(60, 40);
  auto out = larger.block(3, 5, 50, 12);
  Context context(1);
  subject->forward({together.leftCols(12), together.middleCols(12, 12), together.rightCols(12)}, out, context);
  EXPECT_TRUE(same_bits(out.eval(), run_forward(*subject, Sample<float>{query, key, value})));
  out.setZero();
  EXPECT_TRUE(larger.isZero(0)) << "forward wrote beside out";
}

TEST_P(Views, QueryKeyAndValueMayBeTheSameView) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 6};
  const auto subject = make<double>(heads);
  const Matrix<double> tokens = Random(820).matrix<double>(40, 12);
  Matrix<double> out(40, 12);
  Context context(1);
  subject->forward({tokens, tokens, tokens}, out, context);
  EXPECT_TRUE(same_bits(out, run_forward(*subject, Sample<double>{tokens, tokens, tokens})));
}

TEST_P(Views, ResultsInThePlaceOfAnotherMatrixAreRefused) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 6};
  const auto subject = make<float>(heads);
  const Matrix<float> tokens = Random(830).matrix<float>(9, 12);
  Matrix<float> query = tokens, key = tokens, value = tokens, out = tokens, grad_out = tokens;
  Matrix<float> grad_query = tokens, grad_key = tokens, grad_value = tokens;
  const Inputs<float> inputs{query, key, value};
  Context context(1);
  for (Matrix<float>* read : {&query, &key, &value}) {
    EXPECT_THROW(subject->forward(inputs, *read, context), std::invalid_argument);
    EXPECT_EQ(*read, tokens);
  }
  if (!subject->can_be_trained()) return;
  for (Matrix<float>* taken : {&query, &key, &value, &out, &grad_out, &grad_query, &grad_key, &grad_value}) {
    for (std::size_t i = 0; i < 3; ++i) {
      std::array gradients{&grad_query, &grad_key, &grad_value};
      if (gradients[i] == taken) continue;
      gradients[i] = taken;
      EXPECT_THROW(subject->train(inputs, out, grad_out, {*gradients[0], *gradients[1], *gradients[2]}, context),
                   std::invalid_argument);
      if (taken != &out) {
        EXPECT_EQ(*taken, tokens);
      }
    }
  }
}

// As generic code of Eigen's takes matrices, and as it writes through const ones.
template <class Q, class Out>
void attend(const Subject<float>& subject, const Eigen::MatrixBase<Q>& tokens, const Eigen::MatrixBase<Out>& out) {
  Context context(1);
  subject.forward({tokens, tokens, tokens}, const_cast<Eigen::MatrixBase<Out>&>(out), context);
}

TEST_P(Views, GenericCodeMayPassWhatAMatrixIsDerivedFrom) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 6};
  const auto subject = make<float>(heads);
  const Matrix<float> tokens = Random(825).matrix<float>(40, 12);
  Matrix<float> out = Matrix<float>::Zero(50, 12);
  attend(*subject, tokens, out.middleRows(3, 40));
  EXPECT_TRUE(same_bits(out.middleRows(3, 40).eval(), run_forward(*subject, Sample<float>{tokens, tokens, tokens})));
}

TEST_P(Views, BackwardOfScatteredRowsGivesTheSameBits) {
  if (!make<double>()->can_be_trained()) GTEST_SKIP() << "no backward pass";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto sample = masked_sample<T>(70, 830);
    const Matrix<T> grad_out = Random(831).matrix<T>(70, grouped_heads().out_cols());
    const auto expected = train(*subject, sample, grad_out);
    Scattered<T> query(sample.query), key(sample.key), value(sample.value), grad(grad_out), out(0 * grad_out);
    Scattered<T> grad_query(0 * sample.query), grad_key(0 * sample.key), grad_value(0 * sample.value);
    Context context(2);
    subject->train({query.view(), key.view(), value.view(), sample.key_mask}, out.view(), grad.view(),
                   {grad_query.view(), grad_key.view(), grad_value.view()}, context);
    EXPECT_TRUE(same_bits(grad_query.view(), expected.at("query")));
    EXPECT_TRUE(same_bits(grad_key.view(), expected.at("key")));
    EXPECT_TRUE(same_bits(grad_value.view(), expected.at("value")));
    for (Scattered<T>* written : {&out, &grad_query, &grad_key, &grad_value}) EXPECT_TRUE(written->is_intact());
  });
}

}  // namespace
}  // namespace nearfar::test
