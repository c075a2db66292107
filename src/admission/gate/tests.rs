use super::*;

fn admission(max: usize, queue: usize) -> Admission {
    Admission::new(Limits { max, queue }, Gate::Open)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn enter(admission: &Admission) -> Entry {
    admission.enter(soon(), Caller::ANYBODY, 1)
}

#[tokio::test(start_paused = true)]
async fn a_dropped_ticket_wakes_the_next_in_line() {
    let admission = admission(1, 8);
    let held = enter(&admission).await.unwrap();
    let waiting = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    assert_eq!(admission.counts(), Counts { open: 1, waiting: 1, room: 1, gate: Gate::Open });
    drop(held);
    let ticket = waiting.await.unwrap().unwrap();
    assert_eq!(admission.counts(), Counts { open: 1, waiting: 0, room: 1, gate: Gate::Open });
    drop(ticket);
    assert_eq!(admission.counts().open, 0);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_frees_its_slot_at_once() {
    let admission = admission(1, 1);
    let _held = enter(&admission).await.unwrap();
    let waiting = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    assert!(matches!(enter(&admission).await, Err(Refused::Full { .. })));
    waiting.abort();
    let _ = waiting.await;
    assert_eq!(admission.counts().waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn a_place_given_to_somebody_who_leaves_goes_to_the_next() {
    let admission = admission(1, 8);
    let held = enter(&admission).await.unwrap();
    let mut first = Box::pin(enter(&admission));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(first.as_mut().poll(&mut cx).is_pending());
    let second = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    drop(held);
    drop(first); // admitted, never polled again
    assert!(second.await.unwrap().is_ok());
    assert_eq!(admission.counts().open, 0);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait() {
    let admission = admission(0, 8);
    let before = Instant::now();
    assert!(matches!(enter(&admission).await, Err(Refused::Expired { .. })));
    assert!(before.elapsed() >= Duration::from_secs(5));
    assert_eq!(admission.counts().waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn everybody_is_turned_away_when_nothing_will_come() {
    let admission = admission(0, 8);
    let waiting = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    admission.turn_everybody_away();
    assert!(matches!(waiting.await.unwrap(), Err(Refused::TurnedAway)));
}

#[tokio::test(start_paused = true)]
async fn more_places_are_filled_when_the_limit_rises() {
    let admission = admission(0, 8);
    let waiting = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    admission.set_limits(Limits { max: 1, queue: 8 });
    assert!(waiting.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_measured_spread_and_never_below_a_second() {
    let admission = admission(1, 0);
    let retry_after = |refused| match refused {
        Err(Refused::Full { retry_after }) => retry_after,
        other => panic!("{other:?}"),
    };
    let ticket = enter(&admission).await.unwrap();
    let shortest = retry_after(enter(&admission).await);
    assert!((Duration::from_secs(1)..=Duration::from_secs(3)).contains(&shortest), "{shortest:?}");
    tokio::time::advance(Duration::from_secs(40)).await;
    drop(ticket);
    let _ticket = enter(&admission).await.unwrap();
    let mut advice = Vec::new();
    for _ in 0..32 {
        advice.push(retry_after(enter(&admission).await));
    }
    assert!(advice.iter().all(|wait| (Duration::from_secs(40)..=Duration::from_mins(1)).contains(wait)));
    assert!(advice.windows(2).any(|pair| pair[0] != pair[1]), "all the refused return together");
}

#[tokio::test(start_paused = true)]
async fn who_is_displaced_is_told_at_once() {
    let admission = admission(1, 1);
    let _held = enter(&admission).await.unwrap();
    let flood = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    // Two of one line may wait, one of each of two may not: the longer line gives way.
    admission.set_limits(Limits { max: 1, queue: 2 });
    let second = tokio::spawn(enter(&admission));
    tokio::task::yield_now().await;
    let other = Caller { key: KeyId(1), ..Caller::ANYBODY };
    let single = tokio::spawn(admission.enter(soon(), other, 1));
    assert!(matches!(second.await.unwrap(), Err(Refused::Displaced { .. })));
    assert_eq!(admission.counts().waiting, 2);
    drop((flood, single));
}

#[tokio::test(start_paused = true)]
async fn several_places_are_held_and_freed_together() {
    let admission = admission(4, 8);
    let ticket = admission.enter(soon(), Caller::ANYBODY, 3).await.unwrap();
    assert_eq!((admission.counts().open, admission.busy()), (3, vec![(KeyId::ANYBODY, 3, 0)]));
    let mut large = Box::pin(admission.enter(soon(), Caller::ANYBODY, 2));
    assert!(large.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(ticket);
    assert_eq!(admission.counts().open, 2);
    drop(large); // admitted, never polled again
    assert_eq!(admission.counts().open, 0);
}
