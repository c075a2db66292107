//! Cuts the engine's output into lines, in one pass and in bounded memory whatever it writes.

/// The longest line kept. What follows, up to the line's end, is dropped and counted: a line of a
/// gigabyte without a newline must not cost a gigabyte.
pub const MAX_LINE: usize = 16 << 10;

/// One line, without its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawLine<'a> {
    pub bytes: &'a [u8],
    /// Bytes of this line that were dropped beyond [`MAX_LINE`].
    pub dropped: u64,
}

/// Splits on CR and LF (tqdm redraws its bars with CR alone). Empty lines are no lines.
#[derive(Debug, Default)]
pub struct Splitter {
    /// The begun line, at most [`MAX_LINE`] bytes.
    begun: Vec<u8>,
    dropped: u64,
}

impl Splitter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what was read; `each` gets every line that is complete. A line that lies wholly in
    /// `bytes` is not copied.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(RawLine<'_>)) {
        while let Some(end) = memchr::memchr2(b'\n', b'\r', bytes) {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.begun.is_empty() {
                let kept = &line[..line.len().min(MAX_LINE)];
                if !kept.is_empty() {
                    apart(kept, (line.len() - kept.len()) as u64, &mut each);
                }
            } else {
                self.keep(line);
                self.flush(&mut each);
            }
        }
        self.keep(bytes);
        // tqdm writes the CR *before* a bar: waiting for the next one would show every bar one step
        // late, and the last one (which may stand for minutes) not at all.
        if is_whole_bar(&self.begun) {
            self.flush(&mut each);
        }
    }

    /// The output has ended: what is left is a line too.
    pub fn finish(&mut self, mut each: impl FnMut(RawLine<'_>)) {
        if !self.begun.is_empty() {
            self.flush(&mut each);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_LINE - self.begun.len();
        let kept = &bytes[..bytes.len().min(room)];
        self.begun.extend_from_slice(kept);
        self.dropped += (bytes.len() - kept.len()) as u64;
    }

    fn flush(&mut self, each: &mut impl FnMut(RawLine<'_>)) {
        apart(&self.begun, self.dropped, each);
        self.begun.clear();
        self.dropped = 0;
    }
}

/// A bar has no end of its own: what another rank writes after it, on the same pipe, is a line too.
fn apart(line: &[u8], dropped: u64, each: &mut impl FnMut(RawLine<'_>)) {
    let bar_end = [&b"/s]["[..], b"/it]["].iter().find_map(|end| {
        let at = memchr::memmem::find(line, end)?;
        Some(at + end.len() - 1)
    });
    match bar_end {
        Some(at) => {
            each(RawLine { bytes: &line[..at], dropped: 0 });
            each(RawLine { bytes: &line[at..], dropped });
        }
        None => each(RawLine { bytes: line, dropped }),
    }
}

/// `…| 1/3 [01:09<02:19, 69.84s/it]`, possibly padded with blanks over a longer bar before it.
fn is_whole_bar(line: &[u8]) -> bool {
    let line = line.trim_ascii_end();
    line.ends_with(b"s/it]") || line.ends_with(b"it/s]")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<(Vec<u8>, u64)> {
        let mut splitter = Splitter::new();
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |line| out.push((line.bytes.to_vec(), line.dropped)));
        }
        splitter.finish(|line| out.push((line.bytes.to_vec(), line.dropped)));
        out
    }

    #[test]
    fn lines_end_at_either_cr_or_lf_and_empty_ones_are_skipped() {
        let got = lines(&[b"one\r\ntw", b"o\n\n\rthree"]);
        assert_eq!(got, [(b"one".to_vec(), 0), (b"two".to_vec(), 0), (b"three".to_vec(), 0)]);
    }

    #[test]
    fn g14_a_line_without_end_costs_no_more_than_its_limit() {
        let mut splitter = Splitter::new();
        let block = vec![b'x'; 1 << 20];
        for _ in 0..64 {
            splitter.push(&block, |_| panic!("no line ended"));
            assert!(splitter.begun.capacity() <= 2 * MAX_LINE);
        }
        let mut seen = Vec::new();
        splitter.push(b"\nnext\n", |line| seen.push((line.bytes.len(), line.dropped)));
        assert_eq!(seen, [(MAX_LINE, (64 << 20) - MAX_LINE as u64), (4, 0)]);
    }

    #[test]
    fn a_bar_is_seen_when_it_is_drawn_and_not_when_the_next_one_is() {
        let mut splitter = Splitter::new();
        let mut seen = Vec::new();
        splitter.push(b"\rLoad:  33% | 1/3 [01:09<02:19, 69.84s/it] ", |line| seen.push(line.bytes.to_vec()));
        assert_eq!(seen.len(), 1);
        splitter.push(b"\rLoad: 100% | 3/3 [01:10<00:00, 18.30it/s]\n", |line| seen.push(line.bytes.to_vec()));
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn a_line_behind_a_bar_is_a_line_of_its_own() {
        let got = lines(&[b"\rLoad:  33% | 1/3 [00:00<?, ?it/s][2026-11-23 18:58:04 TP1] Memory pool end.\n"]);
        assert_eq!(got[1].0, b"[2026-11-23 18:58:04 TP1] Memory pool end.");
        assert_eq!(got.len(), 2);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_invented_however_the_output_is_cut(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(0u8), Just(0xff), Just(b'a')], 0..300),
            cut in 1usize..40,
        ) {
            let chunks: Vec<&[u8]> = bytes.chunks(cut).collect();
            let wanted: Vec<Vec<u8>> = bytes.split(|c| matches!(c, b'\n' | b'\r'))
                .filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect();
            let got: Vec<Vec<u8>> = lines(&chunks).into_iter().map(|(line, _)| line).collect();
            prop_assert_eq!(got, wanted);
        }
    }
}
