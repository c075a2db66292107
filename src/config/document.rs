//! A YAML text as a tree whose every node knows its place and its own words.
//!
//! Scalars keep their source text: `012`, `0x10`, `12:30`, `1e-3` and `1_000` mean what is written,
//! whatever a YAML version would make of them. Anchors, aliases, merge keys and tags are refused: a
//! configuration of one page needs none, and ten lines of them make gigabytes.

use std::sync::Arc;

use serde_saphyr::granit_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span};

use super::error::Mistake;
use super::source::{Place, Source};

/// Deepest nesting. `engine.flags` with a JSON object in it has five levels.
const MAX_DEPTH: usize = 24;

#[derive(Debug, Clone)]
pub enum Node {
    Scalar { text: String, style: Style, place: Place },
    List(Vec<Node>, Place),
    Map(Vec<Entry>, Place),
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub key: String,
    pub key_place: Place,
    pub value: Node,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Bare: may mean true, false or null.
    Plain,
    /// In quotes or a block: always a word.
    Quoted,
}

impl Node {
    pub fn place(&self) -> &Place {
        match self {
            Self::Scalar { place, .. } | Self::List(_, place) | Self::Map(_, place) => place,
        }
    }

    /// Nothing was said after the key, or a bare `null` or `~`.
    pub fn is_null(&self) -> bool {
        matches!(self, Self::Scalar { text, style: Style::Plain, .. }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// `a list`, `a mapping`, `the word “x”`.
    pub fn describe(&self) -> String {
        match self {
            _ if self.is_null() => "empty".to_owned(),
            Self::Scalar { text, .. } => format!("`{text}`"),
            Self::List(..) => "a list".to_owned(),
            Self::Map(..) => "a section".to_owned(),
        }
    }
}

/// Reads one document. An empty one is an empty map.
pub fn parse(source: &Arc<Source>) -> Result<Node, Vec<Mistake>> {
    let mut reader = Reader { source, parser: Parser::new_from_str(&source.text), mistakes: Vec::new() };
    match reader.document() {
        Ok(node) if reader.mistakes.is_empty() => Ok(node),
        Ok(_) => Err(reader.mistakes),
        Err(mistake) => {
            reader.mistakes.push(*mistake);
            Err(reader.mistakes)
        }
    }
}

struct Reader<'a> {
    source: &'a Arc<Source>,
    parser: Parser<'a, serde_saphyr::granit_parser::StrInput<'a>>,
    /// Mistakes that do not stop the reading (duplicate keys).
    mistakes: Vec<Mistake>,
}

type Read<T> = Result<T, Box<Mistake>>;

impl Reader<'_> {
    fn next(&mut self) -> Read<(OwnedEvent, Place)> {
        loop {
            let Some(next) = self.parser.next() else {
                return Ok((OwnedEvent::End, self.span_place(None)));
            };
            let (event, span) = next.map_err(|error| Box::new(self.syntax(&error)))?;
            let place = self.span_place(Some(&span));
            let owned = match event {
                Event::Scalar(text, style, anchor, tag) => {
                    plain_node(anchor, tag.is_some(), &place)?;
                    let style = if style == ScalarStyle::Plain { Style::Plain } else { Style::Quoted };
                    OwnedEvent::Scalar(text.into_owned(), style)
                }
                Event::SequenceStart(_, anchor, tag) => {
                    plain_node(anchor, tag.is_some(), &place)?;
                    OwnedEvent::ListStart
                }
                Event::MappingStart(_, anchor, tag) => {
                    plain_node(anchor, tag.is_some(), &place)?;
                    OwnedEvent::MapStart
                }
                Event::SequenceEnd | Event::MappingEnd => OwnedEvent::CollectionEnd,
                Event::Alias(_) | Event::UnresolvedAlias(_) => return Err(Box::new(no_anchors(&place))),
                Event::DocumentStart(..) => OwnedEvent::DocumentStart,
                Event::StreamEnd => OwnedEvent::End,
                _ => continue,
            };
            return Ok((owned, place));
        }
    }

    fn document(&mut self) -> Read<Node> {
        loop {
            let (event, place) = self.next()?;
            match event {
                OwnedEvent::DocumentStart => {}
                OwnedEvent::End => return Ok(Node::Map(Vec::new(), place)),
                other => {
                    let node = self.node(other, place, 0)?;
                    let (after, place) = self.next()?;
                    if after == OwnedEvent::DocumentStart {
                        return Err(Box::new(
                            Mistake::new(
                                format!("{} holds more than one YAML document", self.source.name),
                                "remove the `---` line, or split the file and give --config twice",
                            )
                            .at(&place, "the second begins here"),
                        ));
                    }
                    return Ok(node);
                }
            }
        }
    }

    fn node(&mut self, event: OwnedEvent, place: Place, depth: usize) -> Read<Node> {
        if depth > MAX_DEPTH {
            return Err(Box::new(
                Mistake::new(format!("nested deeper than {MAX_DEPTH} levels"), "no setting needs that")
                    .at(&place, "here"),
            ));
        }
        match event {
            OwnedEvent::Scalar(text, style) => Ok(Node::Scalar { text, style, place }),
            OwnedEvent::ListStart => {
                let mut items = Vec::new();
                loop {
                    let (event, item_place) = self.next()?;
                    if event == OwnedEvent::CollectionEnd {
                        return Ok(Node::List(items, place));
                    }
                    items.push(self.node(event, item_place, depth + 1)?);
                }
            }
            OwnedEvent::MapStart => self.map(place, depth),
            OwnedEvent::CollectionEnd | OwnedEvent::DocumentStart | OwnedEvent::End => Err(Box::new(
                Mistake::new(format!("{} ends in the middle of a value", self.source.name), "close what was opened")
                    .at(&place, "here"),
            )),
        }
    }

    fn map(&mut self, place: Place, depth: usize) -> Read<Node> {
        let mut entries: Vec<Entry> = Vec::new();
        // Where each key was first said: looking through the list each time would be quadratic.
        let mut seen = std::collections::HashMap::<String, Place>::new();
        loop {
            let (event, key_place) = self.next()?;
            let key = match event {
                OwnedEvent::CollectionEnd => return Ok(Node::Map(entries, place)),
                OwnedEvent::Scalar(text, style) => {
                    if text == "<<" && style == Style::Plain {
                        return Err(Box::new(no_anchors(&key_place)));
                    }
                    text
                }
                _ => {
                    return Err(Box::new(
                        Mistake::new("a key must be a word", "write `key: value`").at(&key_place, "this is the key"),
                    ));
                }
            };
            let (event, value_place) = self.next()?;
            let value = self.node(event, value_place, depth + 1)?;
            if let Some(first) = seen.get(&key) {
                self.mistakes.push(
                    Mistake::new(format!("`{key}` is said twice"), "keep one of the two: neither wins silently")
                        .at(&key_place, "said again here")
                        .also(first, "first said here"),
                );
                continue;
            }
            seen.insert(key.clone(), key_place.clone());
            entries.push(Entry { key, key_place, value });
        }
    }

    fn offset(&self, marker: &Marker) -> usize {
        marker.byte_offset().unwrap_or_else(|| {
            self.source.text.char_indices().nth(marker.index()).map_or(self.source.text.len(), |(at, _)| at)
        })
    }

    fn span_place(&self, span: Option<&Span>) -> Place {
        let (start, end) = span.map_or((self.source.text.len(), self.source.text.len()), |span| {
            (self.offset(&span.start), self.offset(&span.end))
        });
        // A block's span runs over its last line's end; a caret under one line reads better.
        let text = self.source.text.get(start..end.max(start)).unwrap_or_default();
        let len = text.find(['\n', '\r']).unwrap_or(text.len());
        Place { source: Arc::clone(self.source), start, len }
    }

    fn syntax(&self, error: &ScanError) -> Mistake {
        let mut start = self.offset(error.marker()).min(self.source.text.len());
        let text = &self.source.text;
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line = text[line_start..].lines().next().unwrap_or_default();
        let indent = &line[..line.len() - line.trim_start().len()];
        if let Some(tab) = indent.find('\t') {
            return Mistake::new("a tab in the indentation", "YAML indents with spaces only: replace the tab")
                .at(&Place { source: Arc::clone(self.source), start: line_start + tab, len: 1 }, "a tab");
        }
        let said = error.info();
        let help = if said.contains("quot") || said.contains("end of stream") || said.contains("EOF") {
            // The scanner stops where the text ends; the mistake is where the quote was opened.
            if let Some(open) = open_quote(text) {
                start = open;
            }
            "close the quote, or put the whole value in quotes"
        } else if said.contains("bracket") || said.contains("flow") {
            "close the bracket; a word that begins with `[` or `{` needs quotes"
        } else if said.contains("mapping values") {
            "a value that holds `: ` needs quotes; else check the indentation of this line"
        } else {
            "check the indentation of this line and the one above; quote values with `: `, `#`, `{`, `[`, `*`, `&`"
        };
        Mistake::new(format!("not valid YAML: {said}"), help)
            .at(&Place { source: Arc::clone(self.source), start, len: 0 }, "here")
    }
}

/// Refuses what a configuration does not need.
fn plain_node(anchor: usize, tagged: bool, place: &Place) -> Read<()> {
    if anchor != 0 {
        return Err(Box::new(no_anchors(place)));
    }
    if tagged {
        return Err(Box::new(
            Mistake::new("YAML tags (`!…`) are not read here", "write the plain value; quote it if it is a word")
                .at(place, "tagged"),
        ));
    }
    Ok(())
}

/// The first line's quote that is opened after `: ` or `- ` and not closed before the text's end.
fn open_quote(text: &str) -> Option<usize> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        for quote in ['"', '\''] {
            let opens = line.find([':', '-']).map(|sep| (sep, line[sep + 1..].trim_start()));
            if let Some((_, value)) = opens
                && value.starts_with(quote)
                && !value[1..].contains(quote)
            {
                return Some(at + line.len() - value.len());
            }
        }
        at += line.len();
    }
    None
}

fn no_anchors(place: &Place) -> Mistake {
    Mistake::new(
        "anchors (`&x`), aliases (`*x`) and merge keys (`<<`) are not read here",
        "write the value out; a word that begins with `*` or `&` needs quotes",
    )
    .at(place, "here")
}

/// An event without its borrow.
#[derive(Debug, PartialEq)]
enum OwnedEvent {
    Scalar(String, Style),
    ListStart,
    MapStart,
    CollectionEnd,
    DocumentStart,
    End,
}
