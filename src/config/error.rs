//! What is wrong with the configuration, shown with file, line, column, a caret and the way out.
//!
//! Nothing here finds mistakes; `document`, `layers` and `build` do, and collect them all, so that a
//! person mends a file once and not once for each line.

use std::fmt;
use std::sync::Arc;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, SourceCode};

use super::source::{Place, Source};

/// All mistakes of one configuration. Never empty.
#[derive(Debug, Clone)]
pub struct ConfigError {
    pub mistakes: Vec<Mistake>,
}

/// One mistake: what, where, and what to do about it.
#[derive(Debug, Clone)]
pub struct Mistake {
    /// What is wrong, in one sentence.
    pub message: String,
    /// Where it was said; none for what was said nowhere (a missing file, a missing key).
    pub place: Option<Place>,
    /// What stands at the caret.
    pub label: String,
    /// A second place that belongs to it: the first of two equal keys.
    pub also: Option<(Place, String)>,
    /// The way out.
    pub help: String,
}

impl Mistake {
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        let (message, help) = (printable(&message.into()), printable(&help.into()));
        Self { message, place: None, label: String::new(), also: None, help }
    }

    #[must_use]
    pub fn at(mut self, place: &Place, label: impl Into<String>) -> Self {
        self.place = Some(place.clone());
        self.label = label.into();
        self
    }

    #[must_use]
    pub fn also(mut self, place: &Place, label: impl Into<String>) -> Self {
        self.also = Some((place.clone(), label.into()));
        self
    }
}

/// What was said may hold escape codes; a terminal must not obey them.
fn printable(text: &str) -> String {
    let escaped = |c: char| c.is_control() && c != '\n';
    text.chars().map(|c| if escaped(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

impl From<Mistake> for ConfigError {
    fn from(mistake: Mistake) -> Self {
        Self { mistakes: vec![mistake] }
    }
}

impl fmt::Display for Mistake {
    /// One line for a log: `config.yaml:3:8: limits.max is 0 …: the way out`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some((place, label)) = &self.also {
            write!(f, " ({label}: {place})")?;
        }
        if !self.help.is_empty() {
            write!(f, " – {}", self.help)?;
        }
        Ok(())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, mistake) in self.mistakes.iter().enumerate() {
            if nth > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// For a person: each mistake with its snippet. `color` for a terminal.
    pub fn render(&self, color: Color) -> String {
        let theme = match color {
            Color::Terminal => GraphicalTheme::unicode(),
            Color::Plain => GraphicalTheme::unicode_nocolor(),
        };
        let handler = GraphicalReportHandler::new_themed(theme).with_width(100).with_context_lines(1).with_links(false);
        let mut out = String::new();
        for mistake in &self.mistakes {
            // Writing to a String cannot fail; a report that cannot be drawn is still said in one line.
            if handler.render_report(&mut out, &Report::new(mistake)).is_err() {
                out.push_str(&mistake.to_string());
            }
            if !out.ends_with('\n') {
                out.push('\n');
            }
        }
        out
    }
}

impl From<Box<Mistake>> for ConfigError {
    fn from(mistake: Box<Mistake>) -> Self {
        (*mistake).into()
    }
}

/// Whether escape codes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    Terminal,
    Plain,
}

/// One mistake as miette wants it.
#[derive(Debug)]
struct Report<'a> {
    mistake: &'a Mistake,
    source: Option<Arc<Source>>,
}

impl<'a> Report<'a> {
    fn new(mistake: &'a Mistake) -> Self {
        Self { mistake, source: mistake.place.as_ref().map(|place| Arc::clone(&place.source)) }
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.mistake.message)
    }
}

impl std::error::Error for Report<'_> {}

impl Diagnostic for Report<'_> {
    fn help<'b>(&'b self) -> Option<Box<dyn fmt::Display + 'b>> {
        let elsewhere = match (&self.mistake.also, &self.mistake.place) {
            (Some((other, label)), Some(here)) if !Arc::ptr_eq(&other.source, &here.source) => {
                format!("{label}: {other}\n")
            }
            _ => String::new(),
        };
        let text = format!("{elsewhere}{}", self.mistake.help);
        (!text.is_empty()).then(|| Box::new(text) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|source| source.shown() as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let here = self.mistake.place.as_ref()?;
        let label = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let mut labels = vec![LabeledSpan::new_primary_with_span(label(&self.mistake.label), (here.start, here.len))];
        if let Some((place, text)) = &self.mistake.also
            && Arc::ptr_eq(&place.source, &here.source)
        {
            labels.push(LabeledSpan::new_with_span(label(text), (place.start, place.len)));
        }
        Some(Box::new(labels.into_iter()))
    }
}

/// The nearest of `known` to `said`, for "did you mean"; none when nothing is near.
pub fn nearest<'a>(said: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let said_lower = said.to_lowercase().replace('_', "-");
    let mut best: Option<(f64, &'a str)> = None;
    for candidate in known {
        let plain = candidate.to_lowercase().replace('_', "-");
        let mut score = strsim::jaro_winkler(&said_lower, &plain);
        // Transpositions and one wrong letter in a long word matter less than Jaro thinks.
        let distance = strsim::damerau_levenshtein(&said_lower, &plain);
        if distance <= 2 && plain.len() > 4 {
            score = score.max(0.97 - 0.01 * distance as f64);
        }
        if best.is_none_or(|(top, _)| score > top) {
            best = Some((score, candidate));
        }
    }
    best.filter(|(score, _)| *score >= 0.82).map(|(_, candidate)| candidate)
}
