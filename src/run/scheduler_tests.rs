//! The scheduler as a table: events in, actions out; no clock, no process.

use deepgen_contract::id::Fingerprint;
use litemap::LiteMap;
use proptest::prelude::*;

use crate::run::slots::Request;

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
        request: cpu(1.0),
        priority: 0,
        retries: 0,
        backoff: Default::default(),
        remedies: Default::default(),
        timeout_ms: None,
        stall_ms: None,
        failures: 0,
        applied: Default::default(),
        start: Start::Fresh { next_attempt: 1 },
    }
}

fn cpu(share: f64) -> Request {
    Request { shares: LiteMap::from_iter([("cpu".to_owned(), share)]), ids: BTreeMap::new() }
}

fn rules(cpu: f64) -> Rules {
    let capacity = BTreeMap::from([("cpu".to_owned(), cpu)]);
    Rules { capacity, slot_ids: BTreeMap::new(), max_active: usize::MAX, keep_going: true }
}

fn scheduler(entries: Vec<Entry>, cpu: f64) -> Scheduler {
    Scheduler::new(entries, rules(cpu))
}

/// Renders actions the way the tests below write them.
fn show(actions: &[Action]) -> Vec<String> {
    let show = |action: &Action| match action {
        Action::Set { node, state } => format!("{node}={}", state.word()),
        Action::Launch { node, attempt, .. } => format!("launch {node}#{attempt}"),
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
fn slots_hold_nodes_back_until_a_worker_has_ended() {
    let half = |node| Entry { request: cpu(0.5), ..entry(node, &[]) };
    let mut s = scheduler(vec![half("a"), half("b"), half("c")], 1.0);
    let begun = show(&s.on(Event::Begin, 0));
    assert_eq!(begun[3..], ["a=running", "launch a#1", "b=running", "launch b#1"]);
    assert_eq!(show(&s.on(ended("a", 1, Ended::Done), 1)), ["a=sealing", "seal a#1", "c=running", "launch c#1"]);
    assert_eq!(show(&s.on(sealed("a", 1), 2)), ["a=done"]);
    assert!(s.on(sealed("b", 2), 3).is_empty(), "that attempt is not its");
    assert_eq!(show(&s.on(sealed("b", 1), 4)), ["b=done"], "sealed before anybody heard of its end");
}

#[test]
fn a_limit_on_workers_holds_whatever_slots_there_are() {
    let mut s = Scheduler::new(vec![entry("a", &[]), entry("b", &[])], Rules { max_active: 1, ..rules(9.0) });
    assert_eq!(show(&s.on(Event::Begin, 0)), ["a=ready", "b=ready", "a=running", "launch a#1"]);
}

#[test]
fn a_node_that_can_never_fit_fails_and_says_why() {
    let mut big = entry("a", &[]);
    big.request.shares.insert("gpu".into(), 1.0);
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
    let actions = s.on(ended("a", 1, failed(FailureCause::Input)), 1);
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

    let off = Remedies { non_finite: false, ..Remedies::default() };
    for (cause, remedies) in [(FailureCause::Input, Remedies::default()), (FailureCause::NonFinite, off)] {
        let mut s = scheduler(vec![Entry { retries: 2, remedies, ..entry("a", &[]) }], 1.0);
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

/// Returns the launch among actions.
fn launched(actions: &[Action]) -> Option<(u32, BTreeMap<String, Vec<u32>>, JobRemedies)> {
    actions.iter().find_map(|action| match action {
        Action::Launch { attempt, slot_ids, remedies, .. } => Some((*attempt, slot_ids.clone(), *remedies)),
        _ => None,
    })
}

#[test]
fn memory_is_divided_further_each_time_and_checkpoints_are_left_one_by_one() {
    let mut s = scheduler(vec![Entry { retries: 9, ..entry("a", &[]) }], 1.0);
    s.on(Event::Begin, 0);
    let mut after = |attempt, cause| {
        s.on(ended("a", attempt, failed(cause)), u64::from(attempt) * 1_000_000);
        launched(&s.on(Event::Tick, u64::from(attempt) * 1_000_000 + 100_000)).expect("another attempt").2
    };
    let applied = |micro_batch_division, roll_back| JobRemedies { micro_batch_division, roll_back };
    assert_eq!(after(1, FailureCause::OutOfMemory), applied(2, 0));
    assert_eq!(after(2, FailureCause::OutOfMemory), applied(4, 0));
    assert_eq!(after(3, FailureCause::NonFinite), applied(4, 0));
    assert_eq!(after(4, FailureCause::NonFinite), applied(4, 1));
    assert_eq!(after(5, FailureCause::Io), applied(4, 1));
}

#[test]
fn an_attempt_over_its_time_is_stopped_gently_then_killed_and_tried_again() {
    let node = Entry { retries: 1, timeout_ms: Some(1000), ..entry("a", &[]) };
    let mut s = scheduler(vec![node], 1.0);
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(Event::Tick, 999)), Vec::<String>::new());
    assert_eq!(show(&s.on(Event::Tick, 1000)), ["cancel a#1 Gently"]);
    assert_eq!(show(&s.on(Event::Tick, 2000)), Vec::<String>::new());
    assert_eq!(show(&s.on(Event::Tick, 1000 + GRACE_MS)), ["cancel a#1 AtOnce"]);
    assert_eq!(show(&s.on(Event::Tick, 2000 + GRACE_MS)), Vec::<String>::new());
    let actions = s.on(ended("a", 1, died()), 100_000);
    let Action::Set { state: NodeState::Retrying { failure, .. }, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(failure.cause, FailureCause::TimedOut);
}

#[test]
fn a_silent_worker_is_killed_and_a_sign_of_life_counts() {
    let node = Entry { retries: 1, stall_ms: Some(1000), ..entry("a", &[]) };
    let mut s = scheduler(vec![node], 1.0);
    s.on(Event::Begin, 0);
    s.on(Event::Heard { node: name("a") }, 900);
    assert_eq!(show(&s.on(Event::Tick, 1800)), Vec::<String>::new());
    assert_eq!(show(&s.on(Event::Tick, 1900)), ["cancel a#1 AtOnce"]);
    let actions = s.on(ended("a", 1, died()), 2000);
    let Action::Set { state: NodeState::Retrying { failure, .. }, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(failure.cause, FailureCause::Stalled);
}

#[test]
fn nothing_starts_after_the_first_failure_unless_the_run_keeps_going() {
    let nodes = vec![entry("a", &[]), entry("b", &[]), entry("c", &["a"]), entry("d", &[])];
    let mut s = Scheduler::new(nodes, Rules { keep_going: false, ..rules(2.0) });
    s.on(Event::Begin, 0);
    assert_eq!(show(&s.on(ended("a", 1, failed(FailureCause::Input)), 1)), ["a=failed", "c=blocked"]);
    s.on(ended("b", 1, Ended::Done), 2);
    assert_eq!(show(&s.on(sealed("b", 1), 3)), ["b=done", "finish failed"]);
}

#[test]
fn a_higher_priority_starts_first_and_gpus_are_told_apart() {
    let gpu = |node, priority| {
        let shares = LiteMap::from_iter([("gpu".to_owned(), 1.0)]);
        Entry { request: Request { shares, ids: BTreeMap::new() }, priority, ..entry(node, &[]) }
    };
    let capacity = BTreeMap::from([("gpu".to_owned(), 2.0)]);
    let slot_ids = BTreeMap::from([("gpu".to_owned(), vec![4, 6])]);
    let nodes = vec![gpu("a", 0), gpu("b", 5), gpu("c", 1)];
    let mut s = Scheduler::new(nodes, Rules { capacity, slot_ids, ..rules(1.0) });
    let begun = s.on(Event::Begin, 0);
    assert_eq!(show(&begun)[3..], ["b=running", "launch b#1", "c=running", "launch c#1"]);
    assert_eq!(launched(&begun).unwrap().1["gpu"], [4]);
    let next = s.on(ended("b", 1, Ended::Done), 1);
    assert_eq!(launched(&next).unwrap().1["gpu"], [4]);
}

/// A node of a random graph.
#[derive(Debug, Clone)]
struct Plot {
    inputs: Vec<prop::sample::Index>,
    share: u8,
    gpus: u8,
    priority: i64,
    retries: u32,
    /// How its attempts end, then `Done` for ever.
    fates: Vec<u8>,
    start: u8,
}

fn plots() -> impl Strategy<Value = Vec<Plot>> {
    let plot = (
        prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        1..9_u8,
        0..7_u8,
        -2..3_i64,
        0..3_u32,
        prop::collection::vec(0..6_u8, 0..4),
        0..12_u8,
    );
    let plot = plot.prop_map(|(inputs, share, gpus, priority, retries, fates, start)| Plot {
        inputs,
        share,
        gpus,
        priority,
        retries,
        fates,
        start,
    });
    prop::collection::vec(plot, 1..24)
}

fn entries(plots: &[Plot]) -> Vec<Entry> {
    let node = |at: usize| format!("n{at}");
    let entry_of = |(at, plot): (usize, &Plot)| {
        let inputs: Vec<String> =
            if at == 0 { Vec::new() } else { plot.inputs.iter().map(|index| node(index.index(at))).collect() };
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let mut request = cpu(f64::from(plot.share) / 4.0);
        if plot.gpus > 0 {
            request.shares.insert("gpu".to_owned(), f64::from(plot.gpus) / 2.0);
        }
        let start = match plot.start {
            0 => Start::Sealed(Origin::Cached),
            1 => Start::Finished { attempt: 1 },
            _ => Start::Fresh { next_attempt: 1 },
        };
        Entry { request, priority: plot.priority, retries: plot.retries, start, ..entry(&node(at), &inputs) }
    };
    plots.iter().enumerate().map(entry_of).collect()
}

/// What an attempt of fate `fate` ends with.
fn fated(fate: Option<u8>) -> Ended {
    match fate {
        Some(0) => failed(FailureCause::Input),
        Some(1) => failed(FailureCause::OutOfMemory),
        Some(2) => died(),
        Some(3) => failed(FailureCause::Io),
        _ => Ended::Done,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Plays random graphs with random fates to their end, in a random order of ends.
    #[test]
    fn slots_hold_inputs_come_first_runs_end_and_failures_block_their_descendants_only(
        plots in plots(),
        order in prop::collection::vec(any::<prop::sample::Index>(), 256),
        max_active in 1..5_usize,
    ) {
        let capacity = BTreeMap::from([("cpu".to_owned(), 2.0), ("gpu".to_owned(), 2.5)]);
        let entries = entries(&plots);
        let all = entries.clone();
        let mut s = Scheduler::new(entries, Rules { capacity, max_active, ..rules(2.0) });
        let at = |node: &NodeName| node.0[1..].parse::<usize>().unwrap();
        // Nodes at work with what they hold, and results being sealed.
        let mut running: BTreeMap<usize, (u32, Vec<u32>)> = BTreeMap::new();
        let mut sealing: BTreeMap<usize, u32> = BTreeMap::new();
        let (mut result, mut now, mut order) = (None, 0, order.iter().cycle());
        let mut actions = s.on(Event::Begin, now);
        for turn in 0.. {
            prop_assert!(turn < 2000, "the run does not end");
            for action in actions {
                match action {
                    Action::Launch { node, attempt, slot_ids, .. } => {
                        for input in &all[at(&node)].inputs {
                            prop_assert!(s.board().get(input).unwrap().state().is_done(), "{} before {}", node, input);
                        }
                        let ids = slot_ids.get("gpu").cloned().unwrap_or_default();
                        prop_assert!(running.insert(at(&node), (attempt, ids)).is_none());
                    }
                    Action::Seal { node, attempt } => drop(sealing.insert(at(&node), attempt)),
                    Action::Finish(how) => result = Some(how),
                    _ => {}
                }
            }
            prop_assert!(running.len() <= max_active);
            let cpus: f64 = running.keys().map(|at| f64::from(plots[*at].share) / 4.0).sum();
            prop_assert!(cpus <= 2.0 + 1e-6);
            let mut gpus: BTreeMap<u32, f64> = BTreeMap::new();
            for (at, (_, ids)) in &running {
                let share = f64::from(plots[*at].gpus) / 2.0;
                prop_assert_eq!(ids.len(), if share <= 1.0 { usize::from(share > 0.0) } else { share.ceil() as usize });
                ids.iter().for_each(|id| *gpus.entry(*id).or_default() += share.min(1.0));
            }
            for (id, taken) in gpus {
                prop_assert!(taken <= if id == 2 { 0.5 } else { 1.0 } + 1e-6, "GPU {} holds {}", id, taken);
            }
            if result.is_some() {
                break;
            }
            now += 70_000;
            let num = running.len() + sealing.len();
            let pick = if num == 0 { 0 } else { order.next().unwrap().index(num) };
            actions = if let Some((&at, &attempt)) = sealing.iter().nth(pick) {
                sealing.remove(&at);
                s.on(sealed(&format!("n{at}"), attempt), now)
            } else if let Some((&at, &(attempt, _))) = running.iter().nth(pick.saturating_sub(sealing.len())) {
                running.remove(&at);
                let fate = plots[at].fates.get(attempt as usize - 1).copied();
                s.on(ended(&format!("n{at}"), attempt, fated(fate)), now)
            } else {
                s.on(Event::Tick, now)
            };
        }
        prop_assert!(running.is_empty() && sealing.is_empty(), "the end came too early");
        let is_failed = |node: &NodeName| matches!(s.board().get(node).unwrap().state(), NodeState::Failed { .. });
        let mut doomed: BTreeSet<NodeName> = BTreeSet::new();
        for entry in &all {
            if is_failed(&entry.name) || entry.inputs.iter().any(|input| doomed.contains(input)) {
                let is_found = !matches!(entry.start, Start::Fresh { .. });
                doomed.extend((!is_found).then(|| entry.name.clone()));
            }
            let state = s.board().get(&entry.name).unwrap().state();
            match doomed.contains(&entry.name) {
                true => prop_assert!(matches!(state, NodeState::Failed { .. } | NodeState::Blocked { .. }), "{:?}", state),
                false => prop_assert!(state.is_done(), "{} is {:?}", entry.name, state),
            }
        }
        prop_assert_eq!(result == Some(RunResult::Failed), all.iter().any(|entry| is_failed(&entry.name)));
    }
}
