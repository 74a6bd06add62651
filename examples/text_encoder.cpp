// A transformer encoder block run with each mechanism over the bytes of a file: what each takes, and how far its output
// is from that of softmax.
//
//   text_encoder [FILE] [--length N]        the first N bytes (4096) of FILE (this repository's README.md)

#include "comparison.hpp"

#include <exception>

#ifndef NEARFAR_README
#define NEARFAR_README "README.md"
#endif

int main(int count, char** values) try {
  using namespace encoder;
  const Arguments arguments(count, values);
  if (arguments.words.size() > 1)
    throw std::invalid_argument("one FILE at most, but " + arguments.words[1] + " follows.");
  const std::string path = arguments.words.empty() ? NEARFAR_README : arguments.words.front();

  const Comparison comparison(read_text(path, arguments.length));
  const nearfar::Heads heads = Comparison::heads;
  comparison.add("banded", nearfar::Banded<float>(heads, {.window = {64, 64}}));
  comparison.add("linear", nearfar::Linear<float>(heads));
  comparison.add("nystrom", nearfar::Nystrom<float>(heads));
  comparison.add("fmm", nearfar::Fmm<float>(heads));
  comparison.add("additive", nearfar::Additive<float>(heads));
  comparison.add("multipole", nearfar::Multipole<float>(heads));
  comparison.add("multipole, pooled queries", nearfar::Multipole<float>(heads, {.pooled_queries = true}));
} catch (const std::exception& error) {
  std::fprintf(stderr, "text_encoder: %s\n", error.what());
  return 1;
}
