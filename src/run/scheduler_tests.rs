//! The scheduler as a table: events in, actions out; no clock, no process.

use deepgen_contract::id::Fingerprint;

use super::*;

fn name(text: &str) -> NodeName {
    NodeName(text.into())
}

/// A node that takes one `cpu`, with a fingerprint of its own.
fn entry(node: &str, inputs: &[&str]) -> Entry {
    Entry {
        name: name(node),
        fingerprint: Fingerprint(*blake3::hash(node.as_bytes()).as_bytes()),
        inputs: inputs.iter().map(|input| name(input)).collect(),
        slots: BTreeMap::from([("cpu".to_owned(), 1.0)]),
        retries: 0,
        failures: 0,
        start: Start::Fresh { next_attempt: 1 },
    }
}

fn scheduler(entries: Vec<Entry>, cpu: f64) -> Scheduler {
    Scheduler::new(entries, BTreeMap::from([("cpu".to_owned(), cpu)]), usize::MAX)
}

/// Renders actions the way the tests below write them.
fn show(actions: &[Action]) -> Vec<String> {
    let show = |action: &Action| match action {
        Action::Set { node, state } => format!("{node}={}", state.word()),
        Action::Launch { node, attempt } => format!("launch {node}#{attempt}"),
        Action::Attach { node, attempt } => format!("attach {node}#{attempt}"),
        Action::Seal { node, attempt } => format!("seal {node}#{attempt}"),
        Action::Cancel { node, attempt, how } => format!("cancel {node}#{attempt} {how:?}"),
        Action::Finish(result) => format!("finish {}", result.word()),
    };
    actions.iter().map(show).collect()
}

fn ended(node: &str, attempt: u32, ended: Ended) -> Event {
    Event::Ended { node: name(node), attempt, ended }
}

fn failed(cause: FailureCause) -> Ended {
    Ended::Failed(Failure { cause, message: "boom".into() })
}

fn died() -> Ended {
    Ended::Died { message: "killed by signal 9".into() }
}

fn sealed(node: &str, attempt: u32) -> Event {
    Event::Sealed { node: name(node), attempt }
}

#[test]
fn a_chain_runs_in_order_and_finishes() {
    let mut s = scheduler(vec![entry("a", &[]), entry("b", &["a"])], 1.0);
    assert_eq!(show(&s.on(Event::Begin, 0)), ["a=ready", "a=running", "launch a#1"]);
    assert_eq!(show(&s.on(ended("a", 1, Ended::Done), 1)), ["a=sealing", "seal a#1"]);
    assert_eq!(show(&s.on(sealed("a", 1), 2)), ["a=done", "b=ready", "b=running", "launch b#1"]);
    s.on(ended("b", 1, Ended::Done), 3);
    assert_eq!(show(&s.on(sealed("b", 1), 4)), ["b=done", "finish done"]);
    assert_eq!(show(&s.on(Event::Tick, 5)), Vec::<String>::new());
}

#[test]
fn everything_cached_finishes_at_once() {
    let cached = |node, inputs: &[&str]| Entry { start: Start::Sealed(Origin::Cached), ..entry(node, inputs) };
    let mut s = scheduler(vec![cached("a", &[]), cached("b", &["a"])], 1.0);
    assert_eq!(show(&s.on(Event::Begin, 0)), ["a=cached", "b=cached", "finish done"]);
}

#[test]
fn slots_hold_nodes_back_until_a_result_is_sealed() {
    let half = |node| Entry { slots: BTreeMap::from([("cpu".to_owned(), 0.5)]), ..entry(node, &[]) };
    let mut s = scheduler(vec![half("a"), half("b"), half("c")], 1.0);
    let begun = show(&s.on(Event::Begin, 0));
    assert_eq!(begun[3..], ["a=running", "launch a#1", "b=running", "launch b#1"]);
    assert_eq!(show(&s.on(ended("a", 1, Ended::Done), 1)), ["a=sealing", "seal a#1"]);
    assert_eq!(show(&s.on(sealed("a", 1), 2)), ["a=done", "c=running", "launch c#1"]);
}

#[test]
fn a_limit_on_workers_holds_whatever_slots_there_are() {
    let mut s = Scheduler::new(vec![entry("a", &[]), entry("b", &[])], BTreeMap::from([("cpu".to_owned(), 9.0)]), 1);
    assert_eq!(show(&s.on(Event::Begin, 0)), ["a=ready", "b=ready", "a=running", "launch a#1"]);
}

#[test]
fn a_node_that_can_never_fit_fails_and_says_why() {
    let mut big = entry("a", &[]);
    big.slots.insert("gpu".into(), 1.0);
    let mut s = scheduler(vec![big, entry("b", &["a"])], 1.0);
    let actions = s.on(Event::Begin, 0);
    assert_eq!(show(&actions), ["a=failed", "b=blocked", "finish failed"]);
    let Action::Set { state: NodeState::Failed { failure, .. }, .. } = &actions[0] else { panic!("{actions:?}") };
    assert!(failure.message.contains("`gpu`"), "{failure}");
}

#[test]
fn a_failure_blocks_descendants_and_other_branches_go_on() {
    let nodes = vec![entry("a", &[]), entry("x", &[]), entry("b", &["a"]), entry("c", &["b"]), entry("y", &["x"])];
    let mut s = scheduler(nodes, 2.0);
    s.on(Event::Begin, 0);
    let actions = s.on(ended("a", 1, failed(FailureCause::NonFinite)), 1);
    assert_eq!(show(&actions), ["a=failed", "b=blocked", "c=blocked"]);
    let by_a = NodeState::Blocked { by: name("a") };
    assert!(actions.contains(&Action::Set { node: name("c"), state: by_a }));
    s.on(ended("x", 1, Ended::Done), 2);
    assert_eq!(show(&s.on(sealed("x", 1), 3)), ["x=done", "y=ready", "y=running", "launch y#1"]);
    s.on(ended("y", 1, Ended::Done), 4);
    assert_eq!(show(&s.on(sealed("y", 1), 5)), ["y=done", "finish failed"]);
}

#[test]
fn only_causes_that_may_pass_are_retried_with_growing_pauses() {
    let mut s = scheduler(vec![Entry { retries: 2, ..entry("a", &[]) }], 1.0);
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(ended("a", 1, failed(FailureCause::Io)), 100)), ["a=retrying"]);
    assert_eq!(show(&s.on(Event::Tick, 599)), Vec::<String>::new());
    assert_eq!(show(&s.on(Event::Tick, 600)), ["a=ready", "a=running", "launch a#2"]);
    s.on(ended("a", 2, failed(FailureCause::Io)), 1000);
    assert_eq!(show(&s.on(Event::Tick, 1999)), Vec::<String>::new());
    assert_eq!(show(&s.on(Event::Tick, 2000)), ["a=ready", "a=running", "launch a#3"]);
    assert_eq!(show(&s.on(ended("a", 3, failed(FailureCause::Io)), 3000)), ["a=failed", "finish failed"]);

    for cause in [FailureCause::Input, FailureCause::NonFinite] {
        let mut s = scheduler(vec![Entry { retries: 2, ..entry("a", &[]) }], 1.0);
        s.on(Event::Begin, 0);
        assert_eq!(show(&s.on(ended("a", 1, failed(cause)), 1)), ["a=failed", "finish failed"]);
    }
}

#[test]
fn a_worker_that_dies_without_a_word_is_tried_again_within_the_budget() {
    let mut s = scheduler(vec![Entry { retries: 1, ..entry("a", &[]) }], 1.0);
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(ended("a", 1, died()), 0)), ["a=retrying"]);
    s.on(Event::Tick, 10_000);
    assert_eq!(show(&s.on(ended("a", 2, died()), 10_001)), ["a=failed", "finish failed"]);
}

#[test]
fn failures_before_a_crash_count_against_the_same_budget() {
    let resumed = Entry { retries: 1, failures: 1, start: Start::Fresh { next_attempt: 3 }, ..entry("a", &[]) };
    let mut s = scheduler(vec![resumed], 1.0);
    assert_eq!(show(&s.on(Event::Begin, 0))[2], "launch a#3");
    assert_eq!(show(&s.on(ended("a", 3, failed(FailureCause::Io)), 1)), ["a=failed", "finish failed"]);
}

#[test]
fn a_live_worker_is_attached_and_a_finished_one_is_sealed_without_running() {
    let alive = Entry { start: Start::Alive { attempt: 2 }, ..entry("a", &[]) };
    let done = Entry { start: Start::Finished { attempt: 1 }, ..entry("b", &[]) };
    let mut s = scheduler(vec![alive, done], 1.0);
    let begun = show(&s.on(Event::Begin, 0));
    assert_eq!(begun, ["a=running", "attach a#2", "b=sealing", "seal b#1"]);
    assert_eq!(show(&s.on(sealed("b", 1), 1)), ["b=done"]);
    s.on(ended("a", 2, Ended::Done), 2);
    assert_eq!(show(&s.on(sealed("a", 2), 3)), ["a=done", "finish done"]);
}

#[test]
fn a_word_from_an_earlier_attempt_is_ignored() {
    let mut s = scheduler(vec![Entry { start: Start::Fresh { next_attempt: 4 }, ..entry("a", &[]) }], 1.0);
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(ended("a", 3, Ended::Done), 1)), Vec::<String>::new());
    assert_eq!(show(&s.on(ended("a", 4, Ended::Done), 2)), ["a=sealing", "seal a#4"]);
}

#[test]
fn nodes_of_one_fingerprint_run_once() {
    let twin = Entry { name: name("b"), ..entry("a", &[]) };
    let mut s = scheduler(vec![entry("a", &[]), twin], 2.0);
    assert_eq!(show(&s.on(Event::Begin, 0)), ["a=ready", "b=ready", "a=running", "launch a#1"]);
    s.on(ended("a", 1, Ended::Done), 1);
    assert_eq!(show(&s.on(sealed("a", 1), 2)), ["a=done", "b=shared", "finish done"]);
}

#[test]
fn a_gentle_stop_waits_for_checkpoints_and_a_second_one_does_not() {
    let mut s = scheduler(vec![entry("a", &[]), entry("b", &[]), entry("c", &["a"])], 2.0);
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(Event::Stop { how: Cancel::Gently }, 1)), ["cancel a#1 Gently", "cancel b#1 Gently"]);
    assert_eq!(show(&s.on(ended("a", 1, Ended::Stopped { step: 7 }), 2)), ["a=stopped"]);
    assert_eq!(show(&s.on(Event::Stop { how: Cancel::AtOnce }, 3)), ["cancel b#1 AtOnce"]);
    assert_eq!(show(&s.on(ended("b", 1, died()), 4)), ["b=stopped", "finish stopped"]);
}

#[test]
fn a_worker_that_finishes_while_stopping_is_still_sealed() {
    let mut s = scheduler(vec![entry("a", &[]), entry("b", &["a"])], 1.0);
    s.on(Event::Begin, 0);
    s.on(Event::Stop { how: Cancel::Gently }, 1);
    assert_eq!(show(&s.on(ended("a", 1, Ended::Done), 2)), ["a=sealing", "seal a#1"]);
    assert_eq!(show(&s.on(sealed("a", 1), 3)), ["a=done", "b=ready", "finish stopped"]);
}
