#include "suite.hpp"

#include <nearfar/detail/parallel.hpp>

#include <exception>

namespace bench {

std::string Row::name() const {
  return family + '/' + mechanism + (causal ? "/causal" : "/bidirectional") + "/n:" + std::to_string(n) +
         "/threads:" + std::to_string(threads);
}

Suite::Suite(bool quick, const std::string& filter) : quick_(quick), filter_(filter, std::regex::extended) {
  const int all = nearfar::detail::available_processors();
  thread_counts_ = {1};
  if (all > 1) thread_counts_.push_back(all);
}

std::vector<Index> Suite::lengths(Reach reach) const {
  std::vector<Index> lengths;
  for (Index n = 256; n <= (quick_ ? reach.quick : reach.full); n *= quick_ ? 4 : 2) lengths.push_back(n);
  return lengths;
}

void Suite::add(const Row& row, std::function<void(benchmark::State&)> body) {
  const std::string name = row.name();
  if (!std::regex_search(name, filter_)) return;
  ++size_;
  benchmark::RegisterBenchmark(name.c_str(), [body = std::move(body)](benchmark::State& state) {
    try {
      body(state);
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  })->Unit(benchmark::kMillisecond);
}

}  // namespace bench
