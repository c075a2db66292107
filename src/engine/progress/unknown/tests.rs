//! The range in exact numbers: one start of which all is usual, and what each thing that is known changes of it.

use super::*;

const GB: u64 = 1_000_000_000;

/// Imports took what they usually take, so Python's pace is 1; the weights are 8 GB: 4 s from a usual disk, 1 s
/// from memory.
fn usual(stage: Stage) -> Way {
    let known = Known { weights: Some(8 * GB), cores: Some(64), ..Known::default() };
    Way { stage, spent: 0.0, done: 0.0, compiling: None, reading: None, imports: Some(IMPORTS), tp: 1, known }
}

fn knowing(stage: Stage, change: impl FnOnce(&mut Known)) -> Way {
    let mut way = usual(stage);
    change(&mut way.known);
    way
}

/// Of one stage alone, in seconds: the least and the most.
fn of(way: &Way) -> (f64, f64) {
    let Span { least, most } = way.this();
    (least, most)
}

#[test]
fn a_usual_start_has_what_its_stages_usually_take_from_half_to_twice() {
    let stages = [
        (Stage::Ranks, (17.5, 70.0)),
        (Stage::Join, (2.0, 8.0)),
        (Stage::Load, (0.5 + 2.0, 2.0 + 8.0)),
        (Stage::Pool, (1.0, 4.0)),
        (Stage::Capture, (20.0, 80.0)),
        (Stage::Http, (0.25, 1.0)),
        (Stage::WarmUp, (5.0, 20.0)),
    ];
    for (n, (stage, span)) in stages.iter().enumerate() {
        assert_eq!(of(&usual(*stage)), *span, "{stage:?}");
        // What is told rounds outwards, by a second more than it must.
        let (least, most) = stages[n..].iter().fold((0.0, 0.0), |sum, (_, of)| (sum.0 + of.0, sum.1 + of.1));
        let told = (least.floor() as u64).saturating_sub(1)..=most.ceil() as u64 + 1;
        assert_eq!(left(&usual(*stage)), Some(told), "from {stage:?} on");
    }
    assert_eq!(left(&usual(Stage::Ready)), None);
    assert_eq!(left(&usual(Stage::Import)), left(&usual(Stage::Join)), "imports have no range of their own");
}

#[test]
fn what_was_spent_is_taken_off_and_what_is_overdue_may_take_half_as_long_again() {
    for stage in [Stage::Ranks, Stage::Join, Stage::Load, Stage::Pool, Stage::Capture, Stage::Http, Stage::WarmUp] {
        let (least, most) = of(&usual(stage));
        let after = |spent| of(&Way { spent, ..usual(stage) });
        assert_eq!(after(least / 2.0), (least / 2.0, most - least / 2.0), "{stage:?}");
        assert_eq!(after(most * 2.0), (0.0, most), "{stage:?}");
    }
}

#[test]
fn ranks_that_share_processors_import_one_after_the_other() {
    let importing = |tp, cores| Way { tp, imports: None, ..knowing(Stage::Ranks, |known| known.cores = cores) };
    // Eight ranks and the main process on two processors: 4.5 turns of 35 s.
    assert_eq!(of(&importing(8, Some(2))), (78.75, 315.0));
    assert_eq!(of(&importing(8, Some(9))), (17.5, 70.0));
    assert_eq!(of(&importing(8, None)), (17.5, 70.0), "nobody knows how many there are");
    assert_eq!(of(&importing(1, Some(0))), (35.0, 140.0), "none is one");
    // Until it is known how long they took, the rest is taken to go as slowly.
    let join = |way: Way| of(&Way { stage: Stage::Join, ..way });
    assert_eq!(join(importing(8, Some(2))), (9.0, 36.0));
}

#[test]
fn how_long_the_imports_took_tells_how_slow_pythons_other_parts_are() {
    let after = |imports| of(&Way { imports: Some(imports), ..usual(Stage::Join) });
    assert_eq!(after(IMPORTS * 3.0), (6.0, 24.0));
    assert_eq!(after(0.0), (0.6, 2.4), "never less than 0.3 of the usual");
    assert_eq!(after(IMPORTS * 100.0), (40.0, 160.0), "nor more than twenty times");
    let slow = |stage| of(&Way { imports: Some(IMPORTS * 2.0), ..usual(stage) });
    assert_eq!(slow(Stage::Load), (1.0 + 2.0, 4.0 + 8.0), "the disk is as fast as ever");
    assert_eq!(slow(Stage::Pool), (2.0, 8.0));
    assert_eq!(slow(Stage::Capture), of(&usual(Stage::Capture)), "and so is the GPU");
    assert_eq!(slow(Stage::Http), (0.5, 2.0));
    assert_eq!(slow(Stage::WarmUp), (10.0, 40.0));
}

#[test]
fn graphs_take_as_long_as_the_device_the_kernels_and_the_models_size_say() {
    let capture = |change: fn(&mut Known)| of(&knowing(Stage::Capture, change));
    assert_eq!(capture(|known| known.kernels = Kernels::None), (30.0, 120.0));
    assert_eq!(capture(|known| known.weights = Some(LARGE - 1)), (20.0, 80.0));
    assert_eq!(capture(|known| known.weights = Some(LARGE)), (40.0, 160.0));
    assert_eq!(capture(|known| known.weights = None), (40.0, 160.0), "of unknown size: a large one");
    assert_eq!(capture(|known| known.device = Device::Cpu), (0.0, 0.0));
    assert_eq!(of(&knowing(Stage::WarmUp, |known| known.device = Device::Cpu)), (1.1, 4.4));
}

#[test]
fn weights_that_are_being_read_take_what_the_disk_says_and_at_most_their_way_through_memory() {
    let load = |way: Way| way.load();
    let reading = |seconds| Way { reading: Some(seconds), ..usual(Stage::Load) };
    assert_eq!(load(reading(100.0)), Span { least: 60.0, most: 170.0 + 1.0 });
    let unknown = knowing(Stage::Load, |known| known.weights = None);
    assert_eq!(load(unknown), Span { least: 0.0, most: 2_400.0 });
    assert_eq!(load(Way { reading: Some(100.0), ..unknown }), Span { least: 60.0, most: 170.0 });
    // What is read at that rate is what is still to come: nothing is taken off for the time spent.
    assert_eq!(of(&Way { spent: 50.0, ..reading(100.0) }), (0.5 + 60.0, 2.0 + 171.0));
}

#[test]
fn a_bar_is_believed_once_it_has_moved_for_a_while() {
    let load = |done, spent| of(&Way { spent, done, ..usual(Stage::Load) });
    // A quarter in 30 s: three quarters in 90.
    assert_eq!(load(0.25, 30.0), (45.0, 180.0));
    assert_eq!(load(0.25, 5.0), (7.5, 30.0));
    let unmoved = |spent| of(&Way { spent, ..usual(Stage::Load) });
    assert_eq!(load(0.25, 4.9), unmoved(4.9), "for too short a while");
    assert_eq!(load(0.05, 30.0), unmoved(30.0), "by too little");
    let read = Way { done: 0.25, spent: 30.0, reading: Some(7.0), ..usual(Stage::Load) };
    assert_eq!(of(&read), (45.0, 180.0), "it counts what lies in memory, too");
}

#[test]
fn kernels_that_are_compiled_take_ten_to_twenty_minutes_until_their_bar_tells() {
    let pool = |since, done| of(&Way { compiling: Some((since, done)), spent: 7.0, ..usual(Stage::Pool) });
    assert_eq!(pool(0.0, 0.0), (300.0, 1_500.0));
    assert_eq!(pool(100.0, 0.0), (200.0, 1_400.0));
    assert_eq!(pool(100.0, 0.05), (200.0, 1_400.0), "by too little");
    assert_eq!(pool(4.9, 0.5), (295.1, 1_495.1), "for too short a while");
    assert_eq!(pool(100.0, 0.25), (150.0, 600.0));
    assert_eq!(pool(5.0, 0.25), (7.5, 30.0));
}

#[test]
fn a_compilation_may_come_to_large_models_on_a_gpu_without_cached_kernels() {
    let cold = knowing(Stage::Pool, |known| {
        known.kernels = Kernels::None;
        known.weights = Some(LARGE);
    });
    assert_eq!(of(&cold), (1.0, 4.0 + 1_500.0));
    let mut small = cold;
    small.known.weights = Some(LARGE - 1);
    let mut cpu = cold;
    cpu.known.device = Device::Cpu;
    let mut warm = cold;
    warm.known.kernels = Kernels::Perhaps;
    for way in [small, cpu, warm] {
        assert_eq!(of(&way), (1.0, 4.0), "{way:?}");
    }
}
