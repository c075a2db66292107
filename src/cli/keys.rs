//! `sglangd keys`: adds, lists and removes the API keys of `auth.keys_file`.
//!
//! A key is shown once, on standard output and alone there (`KEY=$(sglangd keys add ci)`); the file
//! gets its hash. A running proxy sees the change within seconds.

use std::io::{IsTerminal as _, Write as _};
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::exit::Exit;
use crate::admission::{Priority, Terms};
use crate::config::{Color, Config, Needs, Sources, WhenMissing, load};
use crate::keys::edit::{self, EditError};
use crate::keys::{Exposure, Keys, KeysError, Role};

#[derive(Debug, Args)]
pub struct KeysArgs {
    #[command(subcommand)]
    pub what: What,
}

/// Which file is meant.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// The keys file [default: `auth.keys_file` of the configuration].
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub config: super::ConfigArgs,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Make a key, print it this once, and write its hash into the file.
    Add(AddArgs),
    /// Show the names and what each is granted.
    List(FileArgs),
    /// Take a key out of the file. What is open with it ends in its own time.
    Remove {
        /// The key's name.
        name: String,
        #[command(flatten)]
        file: FileArgs,
    },
}

#[derive(Debug, Args)]
pub struct AddArgs {
    /// A name for metrics and logs: who will use it.
    pub name: String,
    /// Places its requests may hold at once.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub concurrency: Option<u32>,
    /// Its requests that may wait.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub queue: Option<u32>,
    /// Who goes first when not all can.
    #[arg(long, value_enum, default_value = "normal")]
    pub priority: Class,
    /// Its share beside the others of its priority.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub weight: u32,
    /// For the engine's operator routes on the admin listener, and for nothing else.
    #[arg(long)]
    pub operator: bool,
    #[command(flatten)]
    pub file: FileArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Class {
    High,
    Normal,
    Low,
}

impl From<Class> for Priority {
    fn from(class: Class) -> Self {
        match class {
            Class::High => Self::High,
            Class::Normal => Self::Normal,
            Class::Low => Self::Low,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error(transparent)]
    Edit(#[from] EditError),
    #[error("{0}")]
    Config(String),
    #[error(
        "no keys file is set: name one with --file FILE, and write `auth:`, `keys_file: FILE` into the configuration"
    )]
    NoFile,
    #[error("the key cannot be shown ({0}), so it was not added")]
    Shown(std::io::Error),
}

impl Wrong {
    fn exit(&self) -> Exit {
        match self {
            Self::Edit(EditError::Name { .. } | EditError::Unknown { .. } | EditError::Exists { .. })
            | Self::NoFile => Exit::Usage,
            Self::Edit(_) | Self::Config(_) => Exit::Config,
            Self::Shown(_) => Exit::Bug,
        }
    }
}

// Subcommands own their arguments; that this one only reads them is chance.
#[allow(clippy::needless_pass_by_value)]
pub fn run(args: KeysArgs) -> Exit {
    match act(&args) {
        Ok(()) => Exit::Ok,
        Err(wrong) => {
            let text = wrong.to_string();
            // The configuration's own complaints are pages with a prefix of their own.
            eprintln!("{}{}", if matches!(wrong, Wrong::Config(_)) { "" } else { "sglangd: " }, text.trim_end());
            wrong.exit()
        }
    }
}

fn act(args: &KeysArgs) -> Result<(), Wrong> {
    match &args.what {
        What::Add(add) => {
            let file = file(&add.file)?;
            let key = edit::generate();
            let weight = NonZeroU32::new(add.weight).unwrap_or(NonZeroU32::MIN);
            let concurrency = add.concurrency.and_then(NonZeroU32::new);
            let terms = Terms { concurrency, queue: add.queue, priority: add.priority.into(), weight };
            let role = if add.operator { Role::Operator } else { Role::Client };
            edit::add(&file, &add.name, &key, &terms, role)?;
            let mut out = std::io::stdout().lock();
            if let Err(error) = writeln!(out, "{key}").and_then(|()| out.flush()) {
                // Nobody has seen it and nobody ever will.
                edit::remove(&file, &add.name).or_else(|error| match error {
                    EditError::Last { .. } => {
                        std::fs::remove_file(&file).map_err(|source| EditError::Write { path: file.clone(), source })
                    }
                    error => Err(error),
                })?;
                return Err(Wrong::Shown(error));
            }
            eprintln!("This key is shown only once; {} has its hash.", file.display());
            if role == Role::Client {
                eprintln!("Clients send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`.");
            }
            Ok(())
        }
        What::List(args) => {
            let file = file(args)?;
            let (keys, exposure) = Keys::load(&file).map_err(EditError::Keys)?;
            let rows: Vec<[String; 7]> = keys.iter().map(row).collect();
            print_table(["name", "hash", "for", "concurrency", "queue", "priority", "weight"], &rows);
            if exposure == Exposure::WorldReadable {
                eprintln!("warning: everybody on this machine can read {}: chmod o-r", file.display());
            }
            Ok(())
        }
        What::Remove { name, file: args } => {
            let file = file(args)?;
            edit::remove(&file, name)?;
            eprintln!("removed `{name}`; a running sglangd takes no new request with it within seconds");
            Ok(())
        }
    }
}

/// What would keep the proxy from using the keys file that is configured.
pub fn check(config: &Config) -> Result<(), KeysError> {
    config.auth.keys_file.as_deref().map_or(Ok(()), |file| Keys::load(file).map(drop))
}

fn row(key: &crate::keys::Key) -> [String; 7] {
    let none = || "-".to_owned();
    let terms = &key.terms;
    [
        key.name.clone(),
        key.fingerprint(),
        key.role.name().to_owned(),
        terms.concurrency.map_or_else(none, |n| n.to_string()),
        terms.queue.map_or_else(none, |n| n.to_string()),
        terms.priority.name().to_owned(),
        terms.weight.to_string(),
    ]
}

fn print_table(head: [&str; 7], rows: &[[String; 7]]) {
    let mut widths = head.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: [&str; 7]| {
        let line: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        println!("{}", line.join("  ").trim_end());
    };
    print(head);
    for row in rows {
        print(row.each_ref().map(String::as_str));
    }
}

fn file(args: &FileArgs) -> Result<PathBuf, Wrong> {
    if let Some(file) = &args.file {
        return Ok(file.clone());
    }
    let sources = Sources { needs: Needs::ProxyOnly, ..args.config.sources(WhenMissing::BuiltIn) };
    let color = if std::io::stderr().is_terminal() { Color::Terminal } else { Color::Plain };
    let loaded = load(&sources).map_err(|error| Wrong::Config(error.render(color)))?;
    loaded.config.auth.keys_file.ok_or(Wrong::NoFile)
}
