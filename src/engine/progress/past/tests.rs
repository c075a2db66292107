//! The time left in exact numbers: two starts of few steps, so that what is told can be reckoned by hand.

use super::*;

fn track(points: &[(Stage, u16, u64)]) -> Track {
    Track(points.iter().map(|&(stage, part, at_ms)| Point { stage, part, at_ms }).collect())
}

/// 100 s: 20 of them before the work, 60 of load, 20 of the rest.
fn history() -> History {
    let whole = track(&[
        (Stage::Ranks, 0, 5_000),
        (Stage::Join, 0, 10_000),
        (Stage::Load, 0, 20_000),
        (Stage::Load, 500, 50_000),
        (Stage::Capture, 0, 80_000),
        (Stage::Ready, 1_000, 100_000),
    ]);
    History::of(&whole).expect("it became ready")
}

fn left(now_points: &[(Stage, u16, u64)], now_ms: u64) -> Option<u64> {
    history().left_ms(&track(now_points), now_ms)
}

#[test]
fn a_start_that_goes_as_the_last_one_did_has_what_was_left_of_that_one() {
    let whole = history().track;
    assert_eq!(left(&[], 0), Some(100_000));
    for (n, point) in whole.0.iter().enumerate() {
        let so_far = Track(whole.0[..=n].to_vec());
        let next = whole.0.get(n + 1).map_or(100_000, |next| next.at_ms);
        for now in (point.at_ms..=next).step_by(1_000) {
            assert_eq!(history().left_ms(&so_far, now), Some(100_000 - now), "{point:?} at {now} ms");
        }
    }
}

#[test]
fn the_pace_before_the_work_is_that_so_far_and_tells_of_the_work_within_a_quarter() {
    // (13 s + 3) for (5 s + 3): twice as long. 5 s and 10 s of it are still to come, and 80 s of work.
    let slow = [(Stage::Ranks, 0, 13_000)];
    assert_eq!(left(&slow, 13_000), Some(10_000 + 20_000 + 100_000));
    assert_eq!(left(&slow, 17_000), Some(6_000 + 20_000 + 100_000), "a wait is no longer than it is");
    // (1 s + 3) for (5 s + 3): half.
    assert_eq!(left(&[(Stage::Ranks, 0, 1_000)], 1_000), Some(2_500 + 5_000 + 64_000));
    assert_eq!(left(&[(Stage::Join, 0, 23_000)], 23_000), Some(20_000 + 100_000), "the last step before the work");
}

#[test]
fn a_step_before_the_work_that_is_overdue_slows_its_pace_already() {
    // (13 s + 11.3 s of waiting + 3) for (5 s + 5 + 3): 2.1 times as long, where twice as long was to be waited for.
    assert_eq!(left(&[(Stage::Ranks, 0, 13_000)], 24_300), Some(21_000 + 100_000));
    // (13 s + 16.5 s of waiting + 3) for (5 s + 5 + 3): two and a half times as long.
    assert_eq!(left(&[(Stage::Ranks, 0, 13_000)], 29_500), Some(25_000 + 100_000));
}

#[test]
fn the_work_has_a_pace_of_its_own_that_begins_with_a_little_of_the_one_before() {
    // Before the work (43 s + 3) for (20 s + 3): twice as long, which is believed as five quarters for 10 s.
    // Of the work (47.5 s + 12.5) for (30 s + 10): half as long again.
    let slow = [(Stage::Load, 0, 43_000), (Stage::Load, 500, 90_500)];
    assert_eq!(left(&slow, 90_500), Some(45_000 + 30_000));
    assert_eq!(left(&slow, 100_500), Some(35_000 + 30_000));
    // Overdue: (47.5 s + 62.5 + 12.5) for (30 s + 30 + 10).
    assert_eq!(left(&slow, 153_000), Some(35_000));
    // As long before the work as then, which is all that is known as it begins.
    assert_eq!(left(&[(Stage::Load, 0, 20_000)], 20_000), Some(80_000));
    assert_eq!(left(&[(Stage::Load, 0, 43_000)], 43_000), Some(100_000));
}

#[test]
fn a_wait_of_twice_the_usual_and_an_eighth_of_the_start_is_another_way() {
    let waits = |ms: u64| left(&[(Stage::Ranks, 0, 5_000)], 5_000 + ms);
    assert!(waits(2 * 5_000 + 12_500).is_some());
    assert_eq!(waits(2 * 5_000 + 12_501), None);
    let short = History::of(&track(&[(Stage::Load, 0, 4_000), (Stage::Ready, 0, 40_000)])).expect("ready");
    assert!(short.left_ms(&Track::default(), 2 * 4_000 + 10_000).is_some(), "or ten seconds");
    assert_eq!(short.left_ms(&Track::default(), 2 * 4_000 + 10_001), None);
}

#[test]
fn a_place_that_the_last_start_did_not_name_lies_between_those_that_it_did() {
    let around = |stage, part| history().around((stage, part));
    assert_eq!(around(Stage::Import, 0), (0, 5_000));
    assert_eq!(around(Stage::Load, 0), (20_000, 50_000));
    assert_eq!(around(Stage::Load, 250), (20_000, 50_000));
    assert_eq!(around(Stage::Load, 500), (50_000, 80_000));
    assert_eq!(around(Stage::Pool, 0), (50_000, 80_000), "a stage that it passed over");
    assert_eq!(around(Stage::Ready, 1_000), (100_000, 100_000));
}

#[test]
fn the_hundredths_are_those_of_the_last_starts_time() {
    let places = [
        (Stage::Import, 0.0),
        (Stage::Load, 0.0),
        (Stage::Load, 0.499),
        (Stage::Load, 0.5),
        (Stage::Http, 0.0),
        (Stage::Ready, 1.0),
    ];
    let percents = places.map(|(stage, part)| history().percent(Place { stage, part }));
    assert_eq!(percents.to_vec(), [0.0, 20.0, 20.0, 50.0, 80.0, 100.0]);
}

#[test]
fn a_bar_is_kept_in_fiftieths_and_to_its_end() {
    let mut track = Track::default();
    for thousandths in 0..=1_000u16 {
        track.reached(Point { stage: Stage::Load, part: thousandths, at_ms: u64::from(thousandths) });
    }
    assert_eq!(track.0.iter().map(|point| point.part).collect::<Vec<_>>(), (0..=1_000).step_by(20).collect::<Vec<_>>());
    let mut coarse = Track::default();
    for part in [0, 990, 999, 1_000] {
        coarse.reached(Point { stage: Stage::Load, part, at_ms: 0 });
    }
    assert_eq!(coarse.0.iter().map(|point| point.part).collect::<Vec<_>>(), [0, 990, 1_000], "the end is no step");
    coarse.reached(Point { stage: Stage::Pool, part: 0, at_ms: 1 });
    assert_eq!(coarse.last().stage, Stage::Pool, "nor is another stage");
}

#[test]
fn a_stage_that_was_passed_over_was_entered_with_the_one_behind_it() {
    let whole = history().track;
    assert_eq!(whole.entered(Stage::Load), Some(20_000));
    assert_eq!(whole.entered(Stage::Pool), Some(80_000));
    assert_eq!(track(&[(Stage::Join, 0, 1)]).entered(Stage::Load), None);
}
