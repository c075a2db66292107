//! SHA-256 (FIPS 180-4) of bytes as they come, of two files at once where that is quicker: see [`crate::sys::sha256`].
//! Blocks, padding and length only; the compression is `sha2`'s or that one's. Pure.

use crate::sys::sha256::{Block, Words, compress_both};

const BEGIN: Words =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const BLOCK: usize = size_of::<Block>();
/// Where the length stands in the last block.
const LENGTH_AT: usize = BLOCK - 8;

#[derive(Debug, Clone)]
pub struct Sha256 {
    words: Words,
    /// Bytes taken so far.
    length: u64,
    /// The block that is not full yet: as many bytes of it as `length` is beyond a whole block.
    open: Block,
}

impl Default for Sha256 {
    fn default() -> Self {
        Self { words: BEGIN, length: 0, open: [0; BLOCK] }
    }
}

impl Sha256 {
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = self.fill(bytes).as_chunks();
        sha2::block_api::compress256(&mut self.words, blocks);
        self.keep(rest);
    }

    /// Feeds both, in less time than one after the other.
    pub fn update_both([a, b]: [&mut Self; 2], [bytes_a, bytes_b]: [&[u8]; 2]) {
        let ((blocks_a, rest_a), (blocks_b, rest_b)) = (a.fill(bytes_a).as_chunks(), b.fill(bytes_b).as_chunks());
        compress_both([&mut a.words, &mut b.words], [blocks_a, blocks_b]);
        a.keep(rest_a);
        b.keep(rest_b);
    }

    /// Counts these bytes and fills the open block from them. What is left of them begins a block.
    fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let held = (self.length % BLOCK as u64) as usize;
        self.length = self.length.wrapping_add(bytes.len() as u64);
        if held == 0 {
            return bytes;
        }
        let (first, rest) = bytes.split_at(bytes.len().min(BLOCK - held));
        self.open[held..held + first.len()].copy_from_slice(first);
        if held + first.len() == BLOCK {
            sha2::block_api::compress256(&mut self.words, &[self.open]);
        }
        rest
    }

    /// What does not fill a block. Of no bytes, the open block stays as it is.
    fn keep(&mut self, rest: &[u8]) {
        self.open[..rest.len()].copy_from_slice(rest);
    }

    pub fn finish(mut self) -> [u8; 32] {
        let bits = self.length.wrapping_mul(8);
        let held = (self.length % BLOCK as u64) as usize;
        self.open[held] = 0x80;
        self.open[held + 1..].fill(0);
        if held >= LENGTH_AT {
            sha2::block_api::compress256(&mut self.words, &[self.open]);
            self.open = [0; BLOCK];
        }
        self.open[LENGTH_AT..].copy_from_slice(&bits.to_be_bytes());
        sha2::block_api::compress256(&mut self.words, &[self.open]);
        let mut hash = [0; 32];
        for (bytes, word) in hash.as_chunks_mut().0.iter_mut().zip(self.words) {
            *bytes = word.to_be_bytes();
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::Digest as _;

    use super::*;

    #[test]
    fn every_length_around_a_block_is_padded_as_the_standard_has_it() {
        let bytes: Vec<u8> = (0..200).collect();
        for length in 0..bytes.len() {
            let mut hash = Sha256::default();
            hash.update(&bytes[..length]);
            assert_eq!(hash.finish()[..], sha2::Sha256::digest(&bytes[..length])[..], "{length} bytes");
        }
    }

    proptest! {
        /// However the bytes are cut, and whether they come alone or beside another file's.
        #[test]
        fn two_files_at_once_have_the_hashes_that_each_has_alone(
            pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..300), prop::collection::vec(any::<u8>(), 0..300), 0..3), 0..12),
        ) {
            let (mut a, mut b) = (Sha256::default(), Sha256::default());
            let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
            for (x, y, how) in &pieces {
                if *how == 0 {
                    a.update(x);
                    b.update(y);
                } else {
                    Sha256::update_both([&mut a, &mut b], [x, y]);
                }
                all_a.extend_from_slice(x);
                all_b.extend_from_slice(y);
            }
            prop_assert_eq!(&a.finish()[..], &sha2::Sha256::digest(&all_a)[..]);
            prop_assert_eq!(&b.finish()[..], &sha2::Sha256::digest(&all_b)[..]);
        }
    }
}
