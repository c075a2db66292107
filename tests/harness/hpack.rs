//! HPACK as far as the tests need it: an encoder that writes every field out, and a whole decoder.

use std::collections::VecDeque;

/// A field as it is written: nothing is indexed, nothing compressed, nothing checked.
pub fn literal(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Vec<u8> {
    let mut out = vec![0];
    for text in [name.as_ref(), value.as_ref()] {
        integer(&mut out, 0, 7, text.len());
        out.extend_from_slice(text);
    }
    out
}

/// The same, put into the decoder's table.
pub fn indexed_literal(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Vec<u8> {
    let mut out = literal(name, value);
    out[0] = 0x40;
    out
}

pub fn block<N: AsRef<[u8]>, V: AsRef<[u8]>>(fields: &[(N, V)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| literal(name, value)).collect()
}

fn integer(out: &mut Vec<u8>, flags: u8, bits: u8, mut value: usize) {
    let most = (1 << bits) - 1;
    if value < most {
        out.push(flags | value as u8);
        return;
    }
    out.push(flags | most as u8);
    value -= most;
    while value >= 128 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The decoder of one connection.
#[derive(Debug, Default)]
pub struct Decoder {
    table: VecDeque<(String, String)>,
}

impl Decoder {
    pub fn decode(&mut self, mut bytes: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while let Some(&first) = bytes.first() {
            if first & 0x80 != 0 {
                fields.push(self.entry(take_integer(&mut bytes, 7)));
            } else if first & 0xe0 == 0x20 {
                take_integer(&mut bytes, 5);
            } else {
                let indexing = first & 0x40 != 0;
                let name = match take_integer(&mut bytes, if indexing { 6 } else { 4 }) {
                    0 => take_text(&mut bytes),
                    index => self.entry(index).0,
                };
                let field = (name, take_text(&mut bytes));
                if indexing {
                    self.table.push_front(field.clone());
                    while self.table.iter().map(|(name, value)| name.len() + value.len() + 32).sum::<usize>() > 4096 {
                        self.table.pop_back();
                    }
                }
                fields.push(field);
            }
        }
        fields
    }

    fn entry(&self, index: usize) -> (String, String) {
        match STATIC.get(index - 1) {
            Some((name, value)) => ((*name).to_owned(), (*value).to_owned()),
            None => self.table[index - 1 - STATIC.len()].clone(),
        }
    }
}

fn take_integer(bytes: &mut &[u8], bits: u8) -> usize {
    let most = (1 << bits) - 1;
    let mut value = bytes[0] as usize & most;
    *bytes = &bytes[1..];
    let mut shift = 0;
    while value >= most {
        let byte = bytes[0] as usize;
        *bytes = &bytes[1..];
        value += (byte & 127) << shift;
        shift += 7;
        if byte & 128 == 0 {
            break;
        }
    }
    value
}

fn take_text(bytes: &mut &[u8]) -> String {
    let compressed = bytes[0] & 0x80 != 0;
    let length = take_integer(bytes, 7);
    let (text, rest) = bytes.split_at(length);
    *bytes = rest;
    let text = if compressed { expand(text) } else { text.to_vec() };
    String::from_utf8(text).unwrap()
}

/// RFC 7541's code is canonical: it follows from the lengths of its words.
fn expand(bytes: &[u8]) -> Vec<u8> {
    let mut symbols: Vec<usize> = (0..LENGTHS.len()).collect();
    symbols.sort_by_key(|&symbol| (LENGTHS[symbol], symbol));
    let (mut words, mut word, mut length) = (Vec::new(), 0u32, LENGTHS[symbols[0]]);
    for &symbol in &symbols {
        word <<= LENGTHS[symbol] - length;
        length = LENGTHS[symbol];
        words.push((length, word, symbol as u8));
        word += 1;
    }
    let (mut out, mut word, mut length) = (Vec::new(), 0u32, 0u8);
    for bit in bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)) {
        (word, length) = (word << 1 | u32::from(bit), length + 1);
        if let Ok(at) = words.binary_search_by_key(&(length, word), |&(length, word, _)| (length, word)) {
            out.push(words[at].2);
            (word, length) = (0, 0);
        }
    }
    assert!(length < 8 && word == (1 << length) - 1, "the padding is not the beginning of the longest word");
    out
}

/// How many bits each byte's word has.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26,
];

const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];
