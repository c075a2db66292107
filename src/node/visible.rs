//! Which GPUs an engine uses: those that `CUDA_VISIBLE_DEVICES` names, in its order, and of them as many
//! as it has ranks.

use super::gpus::Gpu;

/// How many GPUs the engine takes of those that it sees, and from which on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub ranks: usize,
    /// `base-gpu-id`
    pub first: usize,
    /// `gpu-id-step`
    pub step: usize,
}

/// The GPUs that the engine will use, in the order of its ranks, and what is odd about the choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    pub gpus: Vec<Gpu>,
    pub complaint: Option<String>,
}

/// `said` is the value of `CUDA_VISIBLE_DEVICES`; none: all GPUs.
pub fn choose(all: &[Gpu], said: Option<&str>, share: Share) -> Chosen {
    let (seen, mut complaint) = visible(all, said);
    let wanted = (0..share.ranks).map(|rank| share.first + rank * share.step.max(1));
    let gpus: Vec<Gpu> = wanted.filter_map(|at| seen.get(at)).map(|gpu| (*gpu).clone()).collect();
    if gpus.len() < share.ranks && complaint.is_none() {
        complaint = Some(format!(
            "the engine wants {} GPUs and sees {}{}",
            share.ranks,
            seen.len(),
            said.map_or_else(String::new, |said| format!(" (CUDA_VISIBLE_DEVICES={said})"))
        ));
    }
    Chosen { gpus, complaint }
}

/// As CUDA reads it: by number or by the beginning of a UUID; the first word that names nothing ends the
/// list. Of a GPU that is split, a part (`MIG-…`) is what CUDA sees: the first one where none is named.
fn visible<'a>(all: &'a [Gpu], said: Option<&str>) -> (Vec<&'a Gpu>, Option<String>) {
    let seen_of = |gpu: &'a Gpu| gpu.parts.first().unwrap_or(gpu);
    let Some(said) = said else { return (all.iter().map(seen_of).collect(), None) };
    let mut seen: Vec<&Gpu> = Vec::new();
    for word in said.split(',').map(str::trim) {
        if word.is_empty() && seen.is_empty() {
            break;
        }
        let found = match word.parse::<u32>() {
            Ok(index) => all.iter().find(|gpu| gpu.index == index).map(seen_of),
            Err(_) if word.starts_with("GPU-") => the_only(all.iter(), word).map(seen_of),
            Err(_) if word.starts_with("MIG-") => {
                let part = the_only(all.iter().flat_map(|gpu| &gpu.parts), word);
                if part.is_none() {
                    // In words that the driver does not use, or a driver that tells of no parts: CUDA may know it.
                    let complaint = format!(
                        "CUDA_VISIBLE_DEVICES={said}: the driver tells nothing of {word}, a part of a GPU; its memory is \
                         not looked at"
                    );
                    return (seen, Some(complaint));
                }
                part
            }
            Err(_) => None,
        };
        match found {
            Some(gpu) if !seen.iter().any(|known| known.uuid == gpu.uuid) => seen.push(gpu),
            Some(gpu) => {
                return (seen, Some(format!("CUDA_VISIBLE_DEVICES={said} names GPU {} twice", gpu.index)));
            }
            // The usual way to say "none".
            None if word == "-1" => break,
            None => {
                let complaint =
                    format!("CUDA_VISIBLE_DEVICES={said}: {word:?} names no GPU here; CUDA reads no further");
                return (seen, Some(complaint));
            }
        }
    }
    (seen, None)
}

/// Whose UUID begins so, if only one's does: more than one is as good as none.
fn the_only<'a>(among: impl Iterator<Item = &'a Gpu>, begins: &str) -> Option<&'a Gpu> {
    let mut matching = among.filter(|gpu| gpu.uuid.starts_with(begins));
    matching.next().filter(|_| matching.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(count: u32) -> Vec<Gpu> {
        let gpu = |index: u32| Gpu {
            index,
            uuid: format!("GPU-{index}abc-{index}"),
            name: "NVIDIA B200".into(),
            memory_total: 1,
            memory_used: 0,
            holders: Vec::new(),
            parts: Vec::new(),
        };
        (0..count).map(gpu).collect()
    }

    fn chosen(said: Option<&str>, ranks: usize, first: usize, step: usize) -> (Vec<u32>, bool) {
        let chosen = choose(&node(8), said, Share { ranks, first, step });
        (chosen.gpus.iter().map(|gpu| gpu.index).collect(), chosen.complaint.is_some())
    }

    #[test]
    fn all_some_and_in_any_order() {
        assert_eq!(chosen(None, 8, 0, 1), ((0..8).collect(), false));
        assert_eq!(chosen(Some("0,1,2,3,4,5,6,7"), 8, 0, 1), ((0..8).collect(), false));
        assert_eq!(chosen(Some("6, 2"), 2, 0, 1), (vec![6, 2], false));
        assert_eq!(chosen(None, 2, 0, 1), (vec![0, 1], false), "one more GPU than ranks is not the engine's");
        assert_eq!(chosen(None, 2, 4, 2), (vec![4, 6], false));
        assert_eq!(chosen(Some("7,6,5,4"), 1, 2, 1), (vec![5], false));
    }

    #[test]
    fn a_uuid_is_known_by_its_beginning_if_only_one_begins_so() {
        assert_eq!(chosen(Some("GPU-3abc-3,GPU-1"), 2, 0, 1), (vec![3, 1], false));
        assert_eq!(chosen(Some("GPU-"), 1, 0, 1), (vec![], true));
    }

    #[test]
    fn the_list_ends_where_it_names_nothing() {
        assert_eq!(chosen(Some("0,1,9,2"), 4, 0, 1), (vec![0, 1], true));
        assert_eq!(chosen(Some("2,2"), 2, 0, 1), (vec![2], true));
        assert_eq!(chosen(Some("MIG-1/2/3"), 1, 0, 1), (vec![], true));
        assert_eq!(chosen(Some(""), 1, 0, 1), (vec![], true), "an empty list is none, not all");
        assert_eq!(chosen(Some("-1"), 1, 0, 1), (vec![], true));
    }

    #[test]
    fn of_a_gpu_that_is_split_the_part_is_seen_that_was_named_or_the_first() {
        let mut all = node(2);
        let part = |letter: &str, total| Gpu {
            index: 1,
            uuid: format!("MIG-{letter}1-22"),
            memory_total: total,
            ..all[1].clone()
        };
        let parts = vec![part("a", 10), part("b", 20)];
        all[1].parts = parts;
        let of = |said: Option<&str>, ranks| {
            let chosen = choose(&all, said, Share { ranks, first: 0, step: 1 });
            let seen: Vec<String> = chosen.gpus.into_iter().map(|gpu| gpu.uuid).collect();
            (seen.join(" "), chosen.complaint)
        };
        assert_eq!(of(Some("MIG-b1-22"), 1), ("MIG-b1-22".into(), None));
        assert_eq!(of(Some("MIG-a"), 1), ("MIG-a1-22".into(), None));
        assert_eq!(of(Some("1"), 1), ("MIG-a1-22".into(), None));
        assert_eq!(of(Some("GPU-1abc-1"), 1), ("MIG-a1-22".into(), None));
        assert_eq!(of(None, 2), ("GPU-0abc-0 MIG-a1-22".into(), None));
        let (seen, complaint) = of(Some("MIG-"), 1);
        assert!(seen.is_empty() && complaint.is_some_and(|said| said.contains("tells nothing of MIG-,")));
    }

    #[test]
    fn too_few_are_said() {
        let chosen = choose(&node(2), Some("0,1"), Share { ranks: 4, first: 0, step: 1 });
        assert_eq!(chosen.complaint.as_deref(), Some("the engine wants 4 GPUs and sees 2 (CUDA_VISIBLE_DEVICES=0,1)"));
    }
}
