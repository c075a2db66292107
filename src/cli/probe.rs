//! `sglangd probe`: two questions to a running server, answers printed as they stream in.

mod ask;
mod sse;

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::FolderArgs;
use super::exit::Exit;

/// What a fresh server is asked, and how long it may take to begin: the first answer may have to wait
/// for a whole start, the second one not.
const QUESTIONS: [(&str, Duration); 2] = [
    ("Explain the transformer architecture in one paragraph.", Duration::from_hours(3)),
    ("Write five different programs in Python and Rust.", Duration::from_mins(1)),
];

#[derive(Debug, Args)]
pub struct ProbeArgs {
    #[command(flatten)]
    pub folders: FolderArgs,
    /// The server to ask, e.g. `http://127.0.0.1:8000`, in place of the one that the runtime folder names.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// An API key [env: SGLANGD_API_KEY].
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Ask this in place of the two questions.
    #[arg(long, value_name = "TEXT")]
    pub content: Option<String>,
    /// Do not try again.
    #[arg(long)]
    pub once: bool,
    /// How long an answer may take to begin: `90s`, `10m`, `3h` [default: 3h, for the second question 1m].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub timeout: Option<Duration>,
    /// The longest answer, in tokens.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// The model's name [default: the first that the server names].
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
}

pub fn run(args: ProbeArgs) -> Exit {
    super::on_this_thread(ask_all(args))
}

async fn ask_all(args: ProbeArgs) -> Exit {
    let server = match ask::Server::new(&args) {
        Ok(server) => server,
        Err(what) => {
            eprintln!("sglangd: {what}");
            return Exit::Usage;
        }
    };
    let questions: Vec<(&str, Duration)> = match &args.content {
        Some(content) => vec![(content.as_str(), QUESTIONS[0].1)],
        None => QUESTIONS.to_vec(),
    };
    for (n, (question, limit)) in questions.into_iter().enumerate() {
        if n > 0 {
            println!();
        }
        println!("> {question}\n");
        let retries = if args.once { ask::Retries::None } else { ask::Retries::Until(args.timeout.unwrap_or(limit)) };
        let patience = args.timeout.unwrap_or(limit);
        let mut page = Page::new();
        match server.ask(question, retries, patience, &mut page).await {
            Ok(figures) => {
                page.end();
                eprintln!("{figures}");
            }
            Err(error) => {
                page.end();
                eprintln!("sglangd: {error}");
                return Exit::Engine;
            }
        }
    }
    Exit::Ok
}

/// `90`, `90s`, `1.5m`, `3h`, `500ms`.
fn time(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{unit:?} is no unit of time; one of ms, s, m, h")),
    };
    let number: f64 = number.parse().map_err(|_| "it begins with no number; say it like 90s, 10m or 3h".to_owned())?;
    Duration::try_from_secs_f64(number * factor).map_err(|error| error.to_string())
}

/// Which part of an answer a piece belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Reasoning,
    Content,
}

/// Standard output: on a terminal reasoning is dimmed, elsewhere the parts have labels.
#[derive(Debug)]
struct Page {
    terminal: bool,
    part: Option<Part>,
}

impl Page {
    fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal(), part: None }
    }

    fn write(&mut self, part: Part, text: &str) {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        // A closed pipe ends nothing here: the figures are still to come.
        let _ = out.write_all(styled(self.terminal, &mut self.part, part, text).as_bytes()).and_then(|()| out.flush());
    }

    fn end(&self) {
        if self.part.is_some() {
            println!("{}", if self.terminal { "\x1b[0m" } else { "" });
        }
    }
}

fn styled(terminal: bool, last: &mut Option<Part>, part: Part, text: &str) -> String {
    let mut out = String::new();
    if *last != Some(part) {
        if last.is_some() {
            out.push_str(if terminal { "\x1b[0m\n\n" } else { "\n\n" });
        }
        out.push_str(match (terminal, part) {
            (true, Part::Reasoning) => "\x1b[2m",
            (true, Part::Content) => "",
            (false, Part::Reasoning) => "[reasoning]\n",
            (false, Part::Content) => "[answer]\n",
        });
        *last = Some(part);
    }
    // A model's words must not steer the terminal.
    out.extend(text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_units() {
        assert_eq!(time("90"), Ok(Duration::from_secs(90)));
        assert_eq!(time("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(time("3h"), Ok(Duration::from_hours(3)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        for wrong in ["", "h", "3 days", "-1", "1e400"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn reasoning_is_dimmed_on_a_terminal_and_labelled_elsewhere() {
        let pieces =
            [(Part::Reasoning, "hm"), (Part::Reasoning, "m"), (Part::Content, "yes\x1b[31m"), (Part::Content, "!")];
        let all = |terminal| {
            let mut last = None;
            pieces.iter().map(|(part, text)| styled(terminal, &mut last, *part, text)).collect::<String>()
        };
        assert_eq!(all(false), "[reasoning]\nhmm\n\n[answer]\nyes[31m!");
        assert_eq!(all(true), "\x1b[2mhmm\x1b[0m\n\nyes[31m!");
    }
}
