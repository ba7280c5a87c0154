//! Which nodes a run computes, and how it is started, stopped, followed and tried again: told with the real program.

mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use harness::{Project, signal, wait_for};
use serde_json::json;

/// Returns the nodes that the newest run computed itself.
fn ran(project: &Project) -> Vec<String> {
    let status = project.status();
    let nodes = status["nodes"].as_array().unwrap().iter();
    let computed = nodes.filter(|node| node["status"]["origin"]["how"] == "ran");
    let mut names: Vec<_> = computed.map(|node| node["node"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

fn run_with(project: &Project, arguments: &[&str]) -> harness::Ran {
    project.deepgen(&[&["run", "pipelines/small.toml"], arguments].concat())
}

/// Waits until a node's first worker has said a word: before that it does not listen to signals.
fn wait_for_first_word(project: &Project, node: &str) {
    project.wait_for_state(node, "running");
    wait_for("the worker's first word", || project.job(node, 1).join("events.jsonl").exists());
}

#[test]
fn to_runs_a_node_and_all_that_it_needs() {
    let project = Project::new();
    run_with(&project, &["--to", "mix"]).expect(0).prints("3 ran, 0 cached");
    assert_eq!(ran(&project), ["mix", "poems", "words"]);
    project.run().expect(0).prints("3 ran, 3 cached");
}

#[test]
fn a_worker_that_ran_out_of_memory_is_tried_again_with_smaller_parts() {
    let project = Project::new();
    project.script(json!({ "sft": { "fail_at": 2, "fail_attempts": 1, "fail_as": "exhaust" } }));
    project.edit("pipelines/small.toml", "[node.sft]", "[node.sft]\nretries = 1");
    run_with(&project, &["--to", "sft"]).expect(0);
    let told = |attempt: u32| -> serde_json::Value {
        let text = fs::read_to_string(project.job("sft", attempt).join("job.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["remedies"]["micro_batch_division"].clone()
    };
    assert_eq!([told(1), told(2)], [json!(1), json!(2)]);
}

#[test]
fn to_does_not_ask_for_files_of_other_branches() {
    let project = Project::new();
    fs::remove_dir_all(project.path("data/base")).unwrap();
    run_with(&project, &["--to", "mix"]).expect(0);
    run_with(&project, &["--to", "sft"]).expect(2).says("data/base");
}

#[test]
fn only_takes_sealed_inputs_and_names_those_that_are_not() {
    let project = Project::new();
    run_with(&project, &["--only", "mix"]).expect(2).says("`mix` needs").says("--to");
    run_with(&project, &["--only", "words", "--only", "poem?"]).expect(0);
    assert_eq!(ran(&project), ["poems", "words"]);
    run_with(&project, &["--only", "mix"]).expect(0).prints("1 ran, 2 cached");
}

#[test]
fn from_and_to_together_run_what_lies_between() {
    let project = Project::new();
    run_with(&project, &["--to", "mix", "--from", "poems"]).expect(2).says("`mix` needs `words`");
    project.run().expect(0);
    let changed = ["--set", "poems.nominal_size=1", "--from", "poems", "--to", "mix"];
    run_with(&project, &changed).expect(0);
    assert_eq!(ran(&project), ["mix", "poems"]);
    run_with(&project, &["--from", "final", "--to", "mix"]).expect(2).says("no node lies between");
}

#[test]
fn an_unknown_node_gets_the_nearest_name() {
    let project = Project::new();
    for option in ["--only", "--from", "--to", "--force"] {
        run_with(&project, &[option, "stf"]).expect(2).says("did you mean `sft`?");
    }
    assert!(!project.path("artifacts/runs").exists());
}

#[test]
fn a_dry_run_says_what_would_run_and_starts_nothing() {
    let project = Project::new();
    run_with(&project, &["--dry-run", "--to", "mix"]).expect(0).prints("never ran");
    assert!(!project.path("artifacts/runs").exists());
    project.run().expect(0);
    run_with(&project, &["--dry-run", "--force", "sft"]).expect(0).prints("--force");
    project.run().expect(0).prints("0 ran, 6 cached");
}

#[test]
fn a_forced_node_is_computed_again_from_its_start_and_nothing_else_is() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 8 } }));
    project.run().expect(0);
    let forced = run_with(&project, &["--force", "sft"]).expect(0).prints("1 ran, 5 cached");
    assert!(!forced.stderr.contains("goes on from step"), "{}", forced.stderr);
    assert!(!forced.stderr.contains("differ"), "{}", forced.stderr);
    assert_eq!(ran(&project), ["sft"]);
    project.run().expect(0).prints("0 ran, 6 cached");

    // The fake worker's result depends on its steps, which its settings do not tell.
    project.script(json!({ "sft": { "steps": 9 } }));
    run_with(&project, &["--force", "sft"]).expect(0).says("sft: 1 file of the new result differ");
}

#[test]
fn a_forced_run_that_was_killed_goes_on_and_does_not_begin_again() {
    let project = Project::new();
    project.run().expect(0);
    project.script(json!({ "sft": { "steps": 60, "step_ms": 20, "checkpoint_every": 5 } }));
    let running = project.start_with(&["--force", "sft", "--force", "words"]);
    project.wait_for_checkpoint("sft", 2, 10);
    running.kill();
    signal(project.worker("sft", 2), "KILL");
    run_with(&project, &["--force", "sft", "--force", "words"]).expect(0).says("sft: goes on from step");
    let attempts = project.attempts();
    assert_eq!((attempts["sft"], attempts["words"], attempts["mix"]), (3, 2, 1));
}

#[test]
fn a_detached_run_goes_on_without_its_terminal_and_can_be_attached_to() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 40, "step_ms": 20, "checkpoint_every": 5 } }));
    run_with(&project, &["--detach"]).expect(0).prints("goes on as process");
    project.wait_for_state("sft", "running");
    let pid = project.orchestrator();
    signal(pid, "HUP");
    run_with(&project, &[]).expect(4).says(&format!("in use by process {pid} on "));
    project.deepgen(&["attach"]).expect(0).says("sft: done").prints("done: 6 ran");
    assert_eq!(ran(&project).len(), 6);
    let run = project.status()["run"].as_str().unwrap().to_owned();
    assert!(project.path(&format!("artifacts/runs/{run}/orchestrator.log")).exists());
    assert_eq!(project.status()["command"].as_array().unwrap().last().unwrap(), "--detach");
}

#[test]
fn a_detached_run_that_cannot_start_says_so_at_once() {
    let project = Project::new();
    fs::remove_dir_all(project.path("data/base")).unwrap();
    run_with(&project, &["--detach"]).expect(2).says("data/base");
    assert!(!project.path("artifacts/runs").exists());
}

#[test]
fn a_hangup_stops_a_foreground_run_gently() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 200, "step_ms": 10, "checkpoint_every": 1000 } }));
    let running = project.start();
    wait_for_first_word(&project, "sft");
    signal(project.orchestrator(), "HUP");
    running.finish().expect(1).says("sft: stopped at step").prints("the same command goes on");
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let project = Project::new();
    // One long step: this worker does not look for signals before its end.
    project.script(json!({ "sft": { "steps": 1, "step_ms": 30_000 } }));
    let running = project.start();
    wait_for_first_word(&project, "sft");
    let pid = project.orchestrator();
    signal(pid, "INT");
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(project.states()["sft"], "running");
    signal(pid, "INT");
    running.finish().expect(1).says("stopping at once");
}

#[test]
fn stop_from_another_terminal_lets_workers_write_a_checkpoint() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 400, "step_ms": 10, "checkpoint_every": 1000 } }));
    run_with(&project, &["--detach"]).expect(0);
    wait_for_first_word(&project, "sft");
    project.deepgen(&["stop", "nosuchrun"]).expect(2).says("no run `nosuchrun`");
    project.deepgen(&["stop"]).expect(0).prints("stopped").prints("sft: stopped at step");
    assert_eq!(project.states()["sft"], "stopped");
    project.deepgen(&["stop"]).expect(0).prints("no run goes on");
    project.script(json!({}));
    run_with(&project, &[]).expect(0).says("goes on with a run");
    // The log of the detached process is there still; the command that goes on was another, the run is the same.
    assert_eq!(project.deepgen(&["runs", "--json"]).stdout.matches("\"run\":").count(), 1);
}

#[test]
fn stop_now_does_not_wait_for_a_worker_that_does_not_listen() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 1, "step_ms": 30_000 } }));
    run_with(&project, &["--detach"]).expect(0);
    wait_for_first_word(&project, "sft");
    project.deepgen(&["stop", "--no-wait"]).expect(0).prints("told to stop");
    project.deepgen(&["stop", "--now"]).expect(0).prints("sft: stopped without a checkpoint");
}

#[test]
fn stop_reaches_workers_whose_orchestrator_was_killed() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 400, "step_ms": 10, "checkpoint_every": 1000 } }));
    let running = project.start();
    wait_for_first_word(&project, "sft");
    running.kill();
    project.deepgen(&["stop"]).expect(0).prints("sft: worker").prints("1 worker told to stop");
    wait_for("the checkpoint", || project.job("sft", 1).join("outcome.json").exists());
}

#[test]
fn retry_tries_again_what_a_run_left_undone_as_it_was_planned() {
    let project = Project::new();
    project
        .script(json!({ "sft": { "fail_at": 3, "fail_as": "input" }, "poems": { "fail_at": 1, "fail_as": "input" } }));
    project.run().expect(1);
    // An edit since does not matter: `retry` takes the plan of the run.
    project.edit("pipelines/small.toml", "seed = 7", "seed = 8");
    project.script(json!({ "sft": { "fail_at": 3, "fail_as": "input" } }));
    project.deepgen(&["retry", "words"]).expect(2).says("`words` is done");
    project.deepgen(&["retry", "pomes"]).expect(2).says("did you mean `poems`?");
    project.deepgen(&["retry", "poems"]).expect(1).prints("1 failed, 1 left");
    assert_eq!(ran(&project), ["mix", "poems"]);
    project.script(json!({}));
    project.deepgen(&["retry"]).expect(0);
    assert_eq!(ran(&project), ["final", "sft"]);
    assert_eq!(project.manifests()["sft"]["seed"], 7);
    project.deepgen(&["retry"]).expect(0).prints("every node of run");
}

#[test]
fn runs_tells_of_each_run_and_json_tells_the_same() {
    let project = Project::new();
    project.script(json!({ "sft": { "fail_at": 3, "fail_as": "input" } }));
    project.run().expect(1);
    project.script(json!({}));
    project.run().expect(0);
    let text = project.deepgen(&["runs"]).expect(0).prints("4 of 6, 1 failed").prints("6 of 6");
    assert!(text.stdout.contains("just now"), "{}", text.stdout);
    let rows: serde_json::Value = serde_json::from_str(&project.deepgen(&["runs", "--json"]).stdout).unwrap();
    let states: BTreeMap<&str, &serde_json::Value> =
        rows.as_array().unwrap().iter().map(|row| (row["state"].as_str().unwrap(), &row["num_done"])).collect();
    assert_eq!(states, BTreeMap::from([("failed", &json!(4)), ("done", &json!(6))]));
}

#[test]
fn gc_tells_first_and_removes_only_what_no_kept_run_needs() {
    let project = Project::new();
    project.run().expect(0);
    let old = project.status()["run"].as_str().unwrap().to_owned();
    run_with(&project, &["--set", "sft.optimizer.lr=1e-4"]).expect(0);
    assert_eq!(project.manifests_all().len(), 8);

    // The newest run needs six of them; checkpoints of sealed nodes are of no use to anyone.
    project
        .deepgen(&["gc", "--keep-runs", "1"])
        .expect(0)
        .prints("2 x result: no kept run needs it")
        .prints("--delete");
    assert_eq!(project.manifests_all().len(), 8);
    project.deepgen(&["runs", "--pin", &old]).expect(0).prints("pinned");
    project
        .deepgen(&["gc", "--keep-runs", "1", "--delete", "-v"])
        .expect(0)
        .prints(&format!("pinned run {old} needs it"));
    assert_eq!(project.manifests_all().len(), 8);
    assert!(!project.job("sft", 1).join("checkpoints").exists());
    run_with(&project, &[]).expect(0).prints("0 ran, 6 cached");

    project.deepgen(&["runs", "--unpin", &old]).expect(0);
    run_with(&project, &["--set", "sft.optimizer.lr=1e-4"]).expect(0).prints("0 ran, 6 cached");
    project.deepgen(&["gc", "--keep-runs", "1", "--delete"]).expect(0).prints("freed");
    assert_eq!(project.manifests_all().len(), 6);
    project.deepgen(&["state", "verify"]).expect(0);
    project.run().expect(0).prints("2 ran, 4 cached");
}

#[test]
fn gc_never_takes_the_last_good_checkpoint_of_an_unfinished_node() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 400, "step_ms": 10, "checkpoint_every": 5 } }));
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 20);
    project.deepgen(&["gc", "--delete"]).expect(4).says("in use by process");
    running.terminate().expect(1);
    project.deepgen(&["gc", "--delete", "--budget", "0B"]).expect(0).prints("over the budget");
    assert_eq!(fs::read_dir(project.job("sft", 1).join("checkpoints")).unwrap().count(), 1);
    project.script(json!({ "sft": { "steps": 400 } }));
    project.run().expect(0).says("sft: goes on from step");
}
