//! Where a checked flag is said: in the engine's YAML or on its command line.

use super::{Kept, Resolved, YamlValue};
use crate::config::is_negative_number;
use crate::engine::flags::Takes;

/// To the YAML where the engine's reader takes it, else to the command line.
pub(super) fn place(flag: &Kept<'_>, value: Checked, out: &mut Resolved) {
    let name = &flag.name;
    let yaml = flag.spec.is_some_and(|spec| spec.yaml_supported);
    match value {
        Checked::On if yaml && flag.spec.is_some_and(|spec| spec.takes() == Takes::Nothing) => {
            out.yaml.push((name.clone(), YamlValue::True));
        }
        Checked::On => out.argv.push(format!("--{name}")),
        Checked::Off => out.argv.push(format!("--no-{name}")),
        // The engine's reader never emits `--flag=value`, the only form that takes such a word.
        Checked::Words(words) if words.len() == 1 && words[0].starts_with('-') && !is_negative_number(&words[0]) => {
            out.argv.push(format!("--{name}={}", words[0]));
        }
        Checked::Words(mut words) => {
            let many = flag.spec.is_some_and(|spec| spec.takes() == Takes::Many);
            if yaml && many {
                out.yaml.push((name.clone(), YamlValue::Words(words)));
            } else if yaml {
                out.yaml.push((name.clone(), YamlValue::Word(words.swap_remove(0))));
            } else {
                out.argv.push(format!("--{name}"));
                out.argv.append(&mut words);
            }
        }
    }
}

/// A value that the parser takes.
pub(super) enum Checked {
    On,
    Off,
    Words(Vec<String>),
}

/// A flag nobody knows, in the form that argparse surely takes.
pub(super) fn unknown_argv(name: &str, value: &Checked, argv: &mut Vec<String>) {
    match value {
        Checked::On => argv.push(format!("--{name}")),
        Checked::Off => {}
        Checked::Words(words) if words.len() == 1 => argv.push(format!("--{name}={}", words[0])),
        Checked::Words(words) => {
            argv.push(format!("--{name}"));
            argv.extend(words.iter().cloned());
        }
    }
}
