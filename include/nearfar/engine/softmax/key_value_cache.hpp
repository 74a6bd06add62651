#pragma once

#include <nearfar/checks.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// What a stream remembers of its last tokens: their keys and values, and whether these may be seen. They lie row after
/// row, as attention reads them, in room that grows by doubling; where only some are needed later, these slide to its
/// front when it is full. Either way a token is moved about once.
template <class T>
struct KeyValueCache {
  Matrix<T> key;                   ///< room x (heads.key_value * dim)
  Matrix<T> value;                 ///< room x (heads.key_value * value_dim)
  std::vector<std::uint8_t> mask;  ///< room
  Index count = 0;                 ///< rows that hold a token, the first ones
  Index back = 0;                  ///< how many tokens before its own a query sees

  static KeyValueCache of(const Heads& heads, Index back, Index room) {
    KeyValueCache cache;
    cache.back = back;
    cache.reallocate(heads.key_cols(), heads.value_cols(), room, 0);
    return cache;
  }

  Index room() const { return key.rows(); }

  /// Appends the keys of `inputs`. Of those before it keeps at least the last `keep`.
  void append(const Inputs<T>& inputs, Index keep) {
    const Index added = inputs.key.rows();
    if (count + added > room()) {
      const Index kept = std::min(keep, count);
      const Index wanted = 2 * kept + added;
      if (room() < wanted) {
        reallocate(key.cols(), value.cols(), wanted, kept);
      } else {
        slide(kept);
      }
    }
    key.middleRows(count, added) = inputs.key.matrix();
    value.middleRows(count, added) = inputs.value.matrix();
    const auto to = mask.begin() + count;
    if (inputs.key_mask.empty()) {
      std::fill(to, to + added, std::uint8_t{1});
    } else {
      std::copy(inputs.key_mask.begin(), inputs.key_mask.end(), to);
    }
    count += added;
  }

  /// These queries and the last `rows` keys.
  Inputs<T> inputs(Tokens<const T> query, Index rows) const {
    const Index first = count - rows;
    return {query,
            Tokens<const T>(key).middle_rows(first, rows),
            Tokens<const T>(value).middle_rows(first, rows),
            {mask.data() + first, static_cast<std::size_t>(rows)}};
  }

 private:
  void slide(Index kept) {
    const auto to_front = [&](auto* rows, Index cols) {
      std::copy(rows + (count - kept) * cols, rows + count * cols, rows);
    };
    to_front(key.data(), key.cols());
    to_front(value.data(), value.cols());
    to_front(mask.data(), Index{1});
    count = kept;
  }

  void reallocate(Index key_cols, Index value_cols, Index rows, Index kept) {
    Matrix<T> new_key(rows, key_cols), new_value(rows, value_cols);
    std::vector<std::uint8_t> new_mask(static_cast<std::size_t>(rows));
    if (kept > 0) {
      new_key.topRows(kept) = key.middleRows(count - kept, kept);
      new_value.topRows(kept) = value.middleRows(count - kept, kept);
      std::copy_n(mask.begin() + (count - kept), kept, new_mask.begin());
    }
    key.swap(new_key);
    value.swap(new_value);
    mask.swap(new_mask);
    count = kept;
  }
};

/// Tokens [first, first + count) of inputs whose queries and keys are the same tokens, one sequence.
template <class T>
Inputs<T> middle_tokens(const Inputs<T>& inputs, Index first, Index count) {
  Inputs<T> part{inputs.query.middle_rows(first, count), inputs.key.middle_rows(first, count),
                 inputs.value.middle_rows(first, count)};
  if (!inputs.key_mask.empty()) {
    part.key_mask = inputs.key_mask.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
  }
  return part;
}

template <class T>
void check_cache(std::string_view mechanism, const Heads& heads, Index back, const KeyValueCache<T>& cache) {
  require(cache.key.cols() == heads.key_cols() && cache.value.cols() == heads.value_cols(), mechanism,
          "this state holds keys and values of ", cache.key.cols(), " and ", cache.value.cols(),
          " columns, but its heads need ", heads.key_cols(), " and ", heads.value_cols(), ": take it from start().");
  require(cache.back == back, mechanism, "this state is of queries that see ", cache.back,
          " tokens before their own, but here they see ", back, ": take it from start().");
  // What a state that was moved from still says it holds may be gone.
  const Index room = std::min({cache.key.rows(), cache.value.rows(), static_cast<Index>(cache.mask.size())});
  require(cache.count <= room, mechanism, "this state holds ", cache.count, " tokens, but has room for ", room,
          ": take it from start().");
}

/// How far a stream looks back through a window.
inline Index tokens_back(const Window& window) { return std::min(window.left, Window::unlimited); }

/// The cache of a stream with room for `room` tokens, or for all that are held at a time where a query sees `back`
/// tokens before its own.
template <class T>
KeyValueCache<T> start_window(std::string_view mechanism, const Heads& heads, Index back, Index room) {
  require(room >= 0, mechanism, "room must be 0 or more, but is ", room, ".");
  return KeyValueCache<T>::of(heads, back, std::min(room, 2 * back + 1));
}

/// Appends tokens to a stream whose queries see their own key and cache.back before it. Calls attend(inputs, out) once
/// or twice, with queries aligned at the end of keys among which are all that they see.
template <class T, class Attend>
void extend_window(KeyValueCache<T>& cache, const Inputs<T>& inputs, Tokens<T> out, Attend&& attend) {
  const Index count = inputs.query.rows();
  const Index back = cache.back;
  // The first queries may see what came before this call: they meet it in the cache. All that the others see came with
  // them, and is read where it stands.
  const Index joined = cache.count == 0 ? 0 : std::min(back, count);
  if (joined > 0) {
    const Index before = std::min(back, cache.count);
    cache.append(middle_tokens(inputs, 0, joined), back);
    attend(cache.inputs(inputs.query.middle_rows(0, joined), before + joined), out.middle_rows(0, joined));
  }
  if (joined == count) return;
  Inputs<T> others = inputs;
  others.query = inputs.query.middle_rows(joined, count - joined);
  attend(others, out.middle_rows(joined, count - joined));
  const Index last = std::min(back, count);
  cache.count = 0;
  cache.append(middle_tokens(inputs, count - last, last), 0);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
