//! Flags that SGLang had once: what became of them, for engines that no longer have them.
//!
//! Used only where the engine's own table lacks the flag: SGLang 0.5.15 takes `cuda-graph-max-bs`
//! as it stands, 0.5.23 ends with "ambiguous option".

/// What became of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The same value, another name; the first of these that the engine has.
    Renamed(&'static [&'static str]),
    /// A bare flag that is now one value of another.
    Became { flag: &'static str, value: &'static str },
    /// Nothing has to be said any more.
    Dropped { why: &'static str },
    /// There is no translation that is surely right.
    Refused { way_out: &'static str },
}

const FATES: &[(&str, Fate)] = &[
    ("collect-tokens-histogram", Fate::Dropped { why: "token histograms always come with enable-metrics" }),
    ("cuda-graph-max-bs", Fate::Renamed(&["cuda-graph-max-bs-decode"])),
    ("cuda-graph-bs", Fate::Renamed(&["cuda-graph-bs-decode"])),
    ("pp", Fate::Renamed(&["pp-size", "pipeline-parallel-size"])),
    ("dp", Fate::Renamed(&["dp-size", "data-parallel-size"])),
    ("ep", Fate::Renamed(&["ep-size", "expert-parallel-size"])),
    ("nsa-prefill-backend", Fate::Renamed(&["dsa-prefill-backend"])),
    ("nsa-decode-backend", Fate::Renamed(&["dsa-decode-backend"])),
    ("oltp-traces-endpoint", Fate::Renamed(&["otlp-traces-endpoint"])),
    ("tokenizer-metrics-allowed-customer-labels", Fate::Renamed(&["tokenizer-metrics-allowed-custom-labels"])),
    ("disable-piecewise-cuda-graph", Fate::Became { flag: "cuda-graph-backend-prefill", value: "disabled" }),
    ("enable-deepep-moe", Fate::Became { flag: "moe-a2a-backend", value: "deepep" }),
    ("enable-flashinfer-mla", Fate::Became { flag: "attention-backend", value: "flashinfer" }),
    ("enable-flashinfer-cutlass-moe", Fate::Became { flag: "moe-runner-backend", value: "flashinfer_cutlass" }),
    ("enable-flashinfer-trtllm-moe", Fate::Became { flag: "moe-runner-backend", value: "flashinfer_trtllm" }),
    ("enable-ep-moe", Fate::Refused { way_out: "say how many groups of experts: `ep-size: N`" }),
    (
        "enable-piecewise-cuda-graph",
        Fate::Refused { way_out: "say which: `cuda-graph-backend-prefill: full` or `breakable`" },
    ),
    (
        "piecewise-cuda-graph-max-tokens",
        Fate::Refused { way_out: "use `cuda-graph-max-bs-prefill` or `cuda-graph-config`" },
    ),
];

pub fn fate(name: &str) -> Option<Fate> {
    FATES.iter().find(|(old, _)| *old == name).map(|(_, fate)| *fate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::flags::FlagTable;

    #[test]
    fn every_translation_ends_at_a_flag_that_the_newest_engine_has() {
        let table = FlagTable::bundled();
        for (old, fate) in FATES {
            match fate {
                Fate::Renamed(names) => assert!(names.iter().any(|name| table.has(name)), "{old}"),
                Fate::Became { flag, value } => {
                    let spec = table.find(flag).unwrap_or_else(|| panic!("{old}: no {flag}"));
                    if let Some(choices) = spec.choice_words() {
                        assert!(choices.iter().any(|c| c == value), "{old}: {flag} has no {value}");
                    }
                }
                Fate::Dropped { .. } | Fate::Refused { .. } => {}
            }
            assert!(!table.has(old) || *old == "ep", "{old} still exists: no fate is needed");
        }
    }
}
