#include "subjects/properties.hpp"

#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

// Results do not depend on threads: neither on how many a context has, nor on who else uses the attention.

namespace nearfar::test {
namespace {

class Threads : public Property {
 protected:
  /// Sequences long enough that every mechanism cuts them into several tasks.
  template <class T>
  static Sample<T> batch() {
    std::vector<Sample<T>> sequences;
    for (const Index n : {700, 0, 131, 1}) sequences.push_back(masked_sample<T>(n, 700 + sequences.size()));
    return pack<T>(sequences);
  }
};

INSTANTIATE_TEST_SUITE_P(All, Threads, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Threads, ForwardHasTheSameBitsForAnyNumberOfThem) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto sample = batch<T>();
    const Matrix<T> expected = run_forward(*subject, sample, 1);
    for (const int threads : {2, 3, 8}) {
      EXPECT_TRUE(same_bits(run_forward(*subject, sample, threads), expected)) << threads << " threads";
    }
  });
}

TEST_P(Threads, BackwardHasTheSameBitsForAnyNumberOfThem) {
  if (!make<double>()->can_be_trained()) GTEST_SKIP() << "no backward pass";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto sample = batch<T>();
    const Matrix<T> grad_out = Random(710).matrix<T>(sample.query.rows(), grouped_heads().out_cols());
    const auto expected = train(*subject, sample, grad_out, 1);
    for (const int threads : {2, 3, 8}) {
      const auto actual = train(*subject, sample, grad_out, threads);
      for (const auto& [name, matrix] : expected) {
        EXPECT_TRUE(same_bits(actual.at(name), matrix)) << name << ", " << threads << " threads";
      }
    }
  });
}

TEST_P(Threads, SeveralCallersMayShareAnAttentionAndAContext) {
  const auto subject = make<float>();
  const auto sample = batch<float>();
  const Matrix<float> expected = run_forward(*subject, sample);
  std::vector<Matrix<float>> results(4, Matrix<float>::Zero(expected.rows(), expected.cols()));
  Context shared(2), own(1);
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < results.size(); ++caller) {
    callers.emplace_back([&, caller] {
      for (int repeat = 0; repeat < 3; ++repeat) {
        subject->forward(sample.inputs(), results[caller], caller == 0 ? own : shared);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const Matrix<float>& result : results) EXPECT_TRUE(same_bits(result, expected));
}

#if defined(__linux__)
TEST(AContext, HasNoMoreThreadsThanThereAreProcessorsForItsProcess) {
  std::thread([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    EXPECT_EQ(Context().threads(), 1);
  }).join();
}
#endif

}  // namespace
}  // namespace nearfar::test
