#include <nearfar/merge.hpp>

#include "subjects/properties.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

// A second call of the same shapes allocates nothing: neither by operator new nor by Eigen's own way to memory.

namespace {

std::atomic<long> allocations{0};
std::atomic<bool> exhausted{false};

}  // namespace

#ifdef __GLIBC__

// Both end in the C library's functions, which a program may replace.
extern "C" {

void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t bytes) {
  ++allocations;
  return exhausted ? nullptr : __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) {
  ++allocations;
  return __libc_calloc(count, bytes);
}
void* realloc(void* memory, std::size_t bytes) {
  ++allocations;
  return __libc_realloc(memory, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  ++allocations;
  return exhausted ? nullptr : __libc_memalign(alignment, bytes);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  ++allocations;
  *memory = __libc_memalign(alignment, bytes);
  return *memory == nullptr ? ENOMEM : 0;
}
}

#else

void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

#endif

namespace nearfar::test {
namespace {

template <class Action>
long allocations_of(Action&& action) {
  const long before = allocations;
  action();
  return allocations - before;
}

TEST(AllocationCount, SeesEveryWayToMemory) {
  static void* volatile keep;
  EXPECT_GT(allocations_of([] {
              keep = ::operator new(100);
              ::operator delete(keep);
            }),
            0);
#ifdef __GLIBC__
  struct alignas(64) Line {
    char bytes[64];
  };
  EXPECT_GT(allocations_of([] {
              auto* line = new Line;
              keep = line;
              delete line;
            }),
            0);
  EXPECT_GT(allocations_of([] {
              Eigen::MatrixXd matrix(9, 9);
              keep = matrix.data();
            }),
            0);
#endif
}

#ifdef __GLIBC__
TEST(Scratch, EndsAScopeWithoutMemoryToJoinItsBlocks) {
  detail::Scratch scratch;
  {
    const detail::Scratch::Scope scope(scratch);
    scratch.take<std::byte>(1);
    scratch.take<std::byte>(1 << 20);
    exhausted = true;
  }
  exhausted = false;
  EXPECT_EQ(scratch.bytes(), 0u);
  const detail::Scratch::Scope scope(scratch);
  EXPECT_NE(scratch.take<std::byte>(1 << 20), nullptr);
}
#endif

TEST(Merge, AllocatesNothing) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 8};
  Random random(930);
  const auto out = random.matrix<float>(300, 16), other_out = random.matrix<float>(300, 16);
  const auto log_sum_exp = random.matrix<double>(2, 300), other_log_sum_exp = random.matrix<double>(2, 300);
  const PartialAttention<const float> a{out, log_sum_exp}, b{other_out, other_log_sum_exp};
  Matrix<float> merged(300, 16), grad_out(300, 16);
  Matrix<double> merged_log_sum_exp(2, 300), grad_log_sum_exp(2, 300);
  const PartialAttention<float> to{merged, merged_log_sum_exp}, also_to{grad_out, grad_log_sum_exp};
  for (const int threads : {1, 3}) {
    Context context(threads);
    EXPECT_EQ(allocations_of([&] { merge<float>(heads, a, b, to, context); }), 0);
    EXPECT_EQ(allocations_of([&] { merge_backward<float>(heads, a, b, a, to, also_to, context); }), 0);
  }
}

class Allocation : public Property {
 protected:
  template <class T>
  static Sample<T> batch() {
    std::vector<Sample<T>> sequences;
    for (const Index n : {300, 0, 77}) sequences.push_back(masked_sample<T>(n, 900 + sequences.size()));
    return pack<T>(sequences);
  }
};

INSTANTIATE_TEST_SUITE_P(All, Allocation, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Allocation, SecondForwardOfTheSameShapesMakesNone) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto sample = batch<T>();
    Matrix<T> out(sample.query.rows(), grouped_heads().out_cols());
    const Inputs<T> inputs = sample.inputs();
    for (const int threads : {1, 3}) {
      Context context(threads);
      subject->forward(inputs, out, context);
      for (int repeat = 0; repeat < 3; ++repeat) {
        EXPECT_EQ(allocations_of([&] { subject->forward(inputs, out, context); }), 0) << threads << " threads";
      }
    }
  });
}

TEST_P(Allocation, SecondTrainingStepOfTheSameShapesMakesNone) {
  if (!make<double>()->can_be_trained()) GTEST_SKIP() << "no backward pass";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto sample = batch<T>();
    const Matrix<T> grad_out = Random(910).matrix<T>(sample.query.rows(), grouped_heads().out_cols());
    Matrix<T> out = grad_out, query = sample.query, key = sample.key, value = sample.value;
    const Inputs<T> inputs = sample.inputs();
    const InputGradients<T> gradients{query, key, value};
    for (const int threads : {1, 3}) {
      Context context(threads);
      subject->train(inputs, out, grad_out, gradients, context);
      for (int repeat = 0; repeat < 3; ++repeat) {
        EXPECT_EQ(allocations_of([&] { subject->train(inputs, out, grad_out, gradients, context); }), 0)
            << threads << " threads";
      }
    }
  });
}

TEST_P(Allocation, StepOfAStreamWithRoomMakesNone) {
  if (!make<double>()->can_stream()) GTEST_SKIP() << "no stream with these options";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    constexpr Index n = 700, steps = 300;
    const auto sample = masked_sample<T>(n, 920);
    Matrix<T> out(n, grouped_heads().out_cols());
    for (const int threads : {1, 3}) {
      Context context(threads);
      subject->start(n);
      const auto extend = [&](Index first, Index count) {
        Inputs<T> inputs{sample.query.middleRows(first, count), sample.key.middleRows(first, count),
                         sample.value.middleRows(first, count)};
        inputs.key_mask = {sample.key_mask.data() + first, static_cast<std::size_t>(count)};
        subject->extend(inputs, out.middleRows(first, count), context);
      };
      extend(0, n - 2 * steps);
      // Working memory is that of the longest step so far.
      for (Index i = n - 2 * steps; i < n - steps; ++i) extend(i, 1);
      EXPECT_EQ(allocations_of([&] {
                  for (Index i = n - steps; i < n; ++i) extend(i, 1);
                }),
                0)
          << threads << " threads";
    }
  });
}

}  // namespace
}  // namespace nearfar::test
