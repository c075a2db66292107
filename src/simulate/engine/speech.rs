//! What the simulated engine says: a fixed answer to each kind of question, cut into pieces the size
//! of tokens.

const TRANSFORMER: &str = "The transformer is a neural network architecture for sequences that replaces recurrence \
with attention. Text is split into tokens, each token becomes a vector, and a position is added to it. Every layer \
then lets each token look at all earlier ones: queries are compared with keys, the resulting weights mix the values, \
and several heads do this side by side, each for another kind of relation. A feed-forward network follows, with \
residual connections and normalisation around both parts. After many such layers a final projection gives the \
probability of the next token. Since all positions are computed at once, training uses the hardware well, and while \
answering, the keys and values of earlier tokens are kept in a cache, so that each new token costs only one step.";

const PROGRAMS: &str = "Here are five programs.\n\n1. Python, Fibonacci numbers:\n\n```python\ndef fib(n):\n    a, b = 0, 1\n    \
for _ in range(n):\n        yield a\n        a, b = b, a + b\n\nprint(list(fib(10)))\n```\n\n2. Rust, counting words:\n\n```rust\n\
use std::collections::HashMap;\n\nfn main() {\n    let text = \"one two two\";\n    let mut count = HashMap::new();\n    \
for word in text.split_whitespace() {\n        *count.entry(word).or_insert(0) += 1;\n    }\n    println!(\"{count:?}\");\n}\n```\n\n\
3. Python, primes by a sieve:\n\n```python\ndef primes(n):\n    sieve = [True] * (n + 1)\n    for i in range(2, n + 1):\n        \
if sieve[i]:\n            yield i\n            for j in range(i * i, n + 1, i):\n                sieve[j] = False\n```\n\n\
4. Rust, greatest common divisor:\n\n```rust\nfn gcd(a: u64, b: u64) -> u64 {\n    if b == 0 { a } else { gcd(b, a % b) }\n}\n```\n\n\
5. Python, reading a file line by line:\n\n```python\nwith open(\"notes.txt\") as file:\n    for number, line in enumerate(file, 1):\n        \
print(number, line.rstrip())\n```\n";

const PLAIN: &str = "This is the simulated engine of sglangd. It has no model: it takes the same arguments, prints the same \
log lines and streams the same kind of events as the real one, so that all around it can be tried and tested. ";

/// An answer before it is cut to the length asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speech {
    pub reasoning: &'static str,
    pub content: &'static str,
}

pub fn answer(prompt: &str) -> Speech {
    if prompt.contains("transformer architecture") {
        Speech {
            reasoning: "The user wants one paragraph. I name attention, layers and the cache, and stay short. ",
            content: TRANSFORMER,
        }
    } else if prompt.contains("five different programs") {
        Speech {
            reasoning: "Five programs in two languages: three in Python, two in Rust. Short ones will do. ",
            content: PROGRAMS,
        }
    } else {
        Speech { reasoning: "A plain question gets a plain answer. ", content: PLAIN }
    }
}

/// Pieces as a tokenizer would make them: a word with the blank before it, cut after six letters.
pub fn tokens(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut letters = 0;
    let mut before = None;
    for (at, c) in text.char_indices() {
        let begins_word = c.is_whitespace() && !before.is_some_and(char::is_whitespace);
        if at > start && (begins_word || letters == 6) {
            pieces.push(&text[start..at]);
            (start, letters) = (at, 0);
        }
        letters += 1;
        before = Some(c);
    }
    if start < text.len() {
        pieces.push(&text[start..]);
    }
    pieces
}

/// A prompt's length in tokens, roughly.
pub fn count(text: &str) -> u64 {
    (text.len() as u64).div_ceil(4).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_make_up_the_text() {
        for text in [TRANSFORMER, PROGRAMS, PLAIN, "", " ", "é e\u{301} \n\n x"] {
            assert_eq!(tokens(text).concat(), text);
            assert!(tokens(text).iter().all(|piece| !piece.is_empty()));
        }
    }
}
