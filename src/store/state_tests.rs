//! Tests of the state: what it holds, and what becomes of a damaged one.

use super::*;
use crate::run::event::RunEvent;
use crate::store::recorder::Recorder;
use crate::store::verification::{Verification, verify};

/// Makes a run with one finished node and returns its layout.
fn project() -> (tempfile::TempDir, Layout) {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(dir.path().to_owned());
    let (state, repairs) = State::open(&layout, 1).unwrap();
    assert_eq!(repairs, Vec::<String>::new());
    let mut recorder = Recorder::open(&layout, "r1", state).unwrap();
    recorder.record(&[started()], 1).unwrap();
    recorder.record(&[node("a", NodeState::Done { origin: Origin::Ran { attempt: 1 } })], 2).unwrap();
    (dir, layout)
}

fn node(name: &str, state: NodeState) -> RunEvent {
    RunEvent::Node { node: NodeName(name.into()), fingerprint: Fingerprint([7; 32]), state }
}

fn started() -> RunEvent {
    RunEvent::RunStarted {
        run: "r1".into(),
        pipeline: "p".into(),
        profile: "tiny".into(),
        seed: 1,
        plan: "x".into(),
        command: vec![],
        pid: 1,
        host: "h".into(),
    }
}

fn assert_holds_the_run(layout: &Layout, expected_repair: Option<&str>) {
    let (state, repairs) = State::open(layout, 99).unwrap();
    match expected_repair {
        Some(text) => assert!(repairs.len() == 1 && repairs[0].contains(text), "{repairs:?}"),
        None => assert!(repairs.is_empty(), "{repairs:?}"),
    }
    let row = &state.run_rows().unwrap()["r1"];
    assert_eq!((row.last_seq, row.plan.as_str()), (2, "x"));
    let node = &state.node_rows("r1").unwrap()[&NodeName("a".into())];
    assert_eq!(node.state, NodeState::Done { origin: Origin::Ran { attempt: 1 } });
}

#[test]
fn the_state_reopens_as_it_was() {
    let (_dir, layout) = project();
    assert_eq!(verify(&layout).unwrap(), Verification::default());
    assert_holds_the_run(&layout, None);
}

#[test]
fn a_state_that_is_held_for_a_moment_is_waited_for_and_not_made_again() {
    let (_dir, layout) = project();
    let file = File::open(layout.state().join(DB_DIR).join(DB_FILE)).unwrap();
    file.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(file);
        });
        assert_holds_the_run(&layout, None);
    });
}

#[test]
fn rows_of_nodes_go_when_their_run_has_ended_and_stay_when_it_was_stopped() {
    for (result, num_left) in [(RunResult::Stopped, 1), (RunResult::Failed, 0), (RunResult::Done, 0)] {
        let (_dir, layout) = project();
        let (state, _) = State::open(&layout, 2).unwrap();
        let left_over = state.node_rows("r1").unwrap();
        assert_eq!(left_over.len(), 1);
        let mut recorder = Recorder::open(&layout, "r1", state).unwrap();
        recorder.record(&[RunEvent::RunFinished { result }], 3).unwrap();
        drop(recorder);
        assert_eq!(verify(&layout).unwrap(), Verification::default());
        let (state, repairs) = State::open(&layout, 4).unwrap();
        assert_eq!((state.node_rows("r1").unwrap().len(), repairs.len()), (num_left, 0), "{result:?}");
        assert_eq!(state.run_rows().unwrap()["r1"].result, Some(result));
        // A kill between the run's row and the end of the removal, or an older program.
        for (node, row) in &left_over {
            state.nodes.insert(node_key("r1", node), serde_json::to_vec(row).unwrap()).unwrap();
        }
        drop(state);
        assert_eq!(verify(&layout).unwrap(), Verification::default());
        let (state, _) = State::open(&layout, 5).unwrap();
        assert_eq!(state.node_rows("r1").unwrap().len(), num_left, "{result:?}");
    }
}

#[test]
fn a_node_that_turns_out_cached_has_no_row_and_loses_the_one_it_had() {
    let (_dir, layout) = project();
    let names = |state: &State| state.node_rows("r1").unwrap().into_keys().map(|node| node.0).collect::<Vec<_>>();
    let cached = || NodeState::Done { origin: Origin::Cached };
    let (state, _) = State::open(&layout, 2).unwrap();
    let mut recorder = Recorder::open(&layout, "r1", state).unwrap();
    recorder.record(&[node("b", NodeState::Ready), node("c", cached())], 3).unwrap();
    drop(recorder);
    let (state, _) = State::open(&layout, 4).unwrap();
    assert_eq!(names(&state), ["a", "b"]);
    let mut recorder = Recorder::open(&layout, "r1", state).unwrap();
    recorder.record(&[node("b", cached()), node("c", cached())], 5).unwrap();
    drop(recorder);
    assert_eq!(verify(&layout).unwrap(), Verification::default());
    let (state, repairs) = State::open(&layout, 6).unwrap();
    assert_eq!((names(&state), repairs.len()), (vec!["a".to_owned()], 0));
    // A row more than the journal tells of: of an older program.
    let row = NodeRow { fingerprint: Fingerprint([7; 32]), state: cached(), failures: 0 };
    state.nodes.insert(node_key("r1", &NodeName("c".into())), serde_json::to_vec(&row).unwrap()).unwrap();
    drop(Recorder::open(&layout, "r1", state).unwrap());
    assert_eq!(names(&State::open(&layout, 7).unwrap().0), ["a"]);
}

#[test]
fn a_missing_database_is_rebuilt_from_the_journals() {
    let (_dir, layout) = project();
    fs::remove_dir_all(layout.state().join(DB_DIR)).unwrap();
    assert_holds_the_run(&layout, Some("empty though there are journals"));
}

#[test]
fn garbage_in_the_database_is_set_aside() {
    let (_dir, layout) = project();
    for entry in fs::read_dir(layout.state().join(DB_DIR)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::write(path, [0xA5; 700]).unwrap();
        }
    }
    assert_holds_the_run(&layout, Some("rebuilt the state of 1 runs"));
    assert_holds_the_run(&layout, None);
}

#[test]
fn damaged_bytes_anywhere_never_stop_the_next_run() {
    let (_dir, layout) = project();
    let file = layout.state().join(DB_DIR).join(DB_FILE);
    let whole = fs::read(&file).unwrap();
    for step in 0..12 {
        let mut damaged = whole.clone();
        let at = step * 61 % damaged.len();
        damaged[at..].iter_mut().take(16).for_each(|byte| *byte ^= 0xFF);
        fs::write(&file, damaged).unwrap();
        let (state, _) = State::open(&layout, 100 + step as u64).unwrap();
        assert_eq!(state.run_rows().unwrap()["r1"].last_seq, 2, "damage at byte {at}");
        drop(state);
        fs::write(&file, &whole).unwrap();
    }
}

#[test]
fn a_state_behind_its_journal_is_brought_up() {
    let (_dir, layout) = project();
    let mut journal = journal::Journal::open(&layout.run("r1").join(JOURNAL_FILE)).unwrap();
    journal.append(&[RunEvent::RunFinished { result: RunResult::Done }], 5).unwrap();
    let found = verify(&layout).unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
    assert!(found.behind[0].contains("lacks the last 1 of 3 lines"), "{found:?}");
    let (state, repairs) = State::open(&layout, 9).unwrap();
    assert!(repairs[0].contains("up to its journal"), "{repairs:?}");
    assert_eq!(state.run_rows().unwrap()["r1"].result, Some(RunResult::Done));
}

#[test]
fn a_state_ahead_of_its_journal_is_set_aside() {
    let (_dir, layout) = project();
    let journal = layout.run("r1").join(JOURNAL_FILE);
    let text = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, text.lines().take(1).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let (state, repairs) = State::open(&layout, 9).unwrap();
    assert!(repairs[0].contains("ends before"), "{repairs:?}");
    assert_eq!(state.run_rows().unwrap()["r1"].last_seq, 1);
}
