#include "subjects/properties.hpp"

// Every mechanism against the naive reference, at the lengths and numbers where code breaks.

namespace nearfar::test {
namespace {

class Borders : public Property {
 protected:
  template <class T>
  static void expect_reference(const Subject<T>& subject, const Sample<T>& sample, double allowed = tolerance<T>()) {
    const auto in_double = make<double>(subject.heads());
    const Matrix<double> expected = GetParam().reference(*in_double, cast<double>(sample).inputs());
    EXPECT_TRUE(close(run_forward(subject, sample), expected, allowed)) << "n = " << sample.query.rows();
  }
};

INSTANTIATE_TEST_SUITE_P(All, Borders, ::testing::ValuesIn(subject_cases()), subject_name);

// Around the blocks, windows, vectors, tiles and chunks, and primes between.
const std::vector<Index> lengths = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  11,  13,  15,  16,  17,  19,  23,
                                    29, 31, 32, 33, 47, 61, 63, 64, 65, 97, 127, 128, 129, 193, 255, 256, 257};

TEST_P(Borders, EveryLengthIsAsTheReference) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : lengths) expect_reference(*subject, random_sample<T>(grouped_heads(), n, 100));
  });
}

TEST_P(Borders, EveryLengthWithMaskedKeysIsAsTheReference) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : lengths) expect_reference(*subject, masked_sample<T>(n, 200));
  });
}

// Whole vectors of queries may see no key where the vectors beside them do.
TEST_P(Borders, RunsOfMaskedKeysAreAsTheReference) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    auto sample = masked_sample<T>(60, 250);
    const auto mask = sample.key_mask;
    for (const int first : {3, 6, 13, 29}) {
      for (const int count : {4, 6, 10, 12, 20, 30}) {
        sample.key_mask = mask;
        std::fill_n(sample.key_mask.begin() + first, count, std::uint8_t{0});
        expect_reference(*subject, sample);
      }
    }
  });
}

TEST_P(Borders, NumbersOfQueriesAndKeysMayDiffer) {
  if (!any_shape()) GTEST_SKIP() << "as many queries as keys";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const auto& [queries, keys] :
         {std::pair<Index, Index>{1, 0}, {0, 1}, {1, 200}, {200, 1}, {65, 130}, {130, 65}}) {
      expect_reference(*subject, random_sample<T>(grouped_heads(), queries, 300, keys));
    }
  });
}

TEST_P(Borders, EveryWidthIsAsTheReference) {
  in_each_scalar([]<class T>(T) {
    for (const Index dim : widths) {
      SCOPED_TRACE(dim);
      Heads heads{.query = 2, .key_value = 1, .dim = dim};
      expect_reference(*make<T>(heads), random_sample<T>(heads, 37, 400));
      if (!any_shape()) continue;
      heads.value_dim = 257 - dim;
      expect_reference(*make<T>(heads), random_sample<T>(heads, 37, 401));
    }
  });
}

TEST_P(Borders, LargeScoresStayFinite) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {3, 70}) {
      auto sample = masked_sample<T>(n, 500);
      sample.query *= T(400);
      sample.key *= T(400);
      EXPECT_TRUE(finite(run_forward(*subject, sample))) << n;
    }
  });
}

TEST_P(Borders, LargeScoresAreAsTheReference) {
  if (!GetParam().takes_infinite_scores) GTEST_SKIP() << "not a softmax over scores";
  // Both signs, up to some 1e5, where double still tells scores 1e-10 apart.
  const auto subject = make<double>();
  auto sample = masked_sample<double>(70, 501);
  sample.query *= 400;
  sample.key *= 400;
  expect_reference(*subject, sample, 1e-9);
}

TEST_P(Borders, ScoreOfMinusInfinityIsNoNaN) {
  if (!GetParam().takes_infinite_scores) GTEST_SKIP() << "not a softmax over scores";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 2, 40, 131}) {
      auto sample = random_sample<T>(grouped_heads(), n, 600);
      sample.query = sample.query.cwiseAbs().array() + T(0.1);
      sample.key.row(n / 2).setConstant(-std::numeric_limits<T>::infinity());
      EXPECT_TRUE(finite(run_forward(*subject, sample))) << n;
      expect_reference(*subject, sample);
    }
  });
}

}  // namespace
}  // namespace nearfar::test
