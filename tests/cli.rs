//! Stories told with the real program and a fake worker: run, edit, run again.

mod harness;

use std::time::Instant;

use harness::Project;
use serde_json::{Value, json};

/// Returns the nodes in a state.
fn nodes_in(project: &Project, state: &str) -> Vec<String> {
    project.states().into_iter().filter(|(_, found)| found == state).map(|(node, _)| node).collect()
}

/// Returns the nodes that the newest run computed itself.
fn ran(project: &Project) -> Vec<String> {
    let status = project.status();
    let nodes = status["nodes"].as_array().unwrap().iter();
    let computed = nodes.filter(|node| node["status"]["origin"]["how"] == "ran");
    let mut names: Vec<_> = computed.map(|node| node["node"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_first_run_computes_everything_and_a_second_one_nothing() {
    let project = Project::new();
    project.run().expect(0).says("sft: done").prints("done: 6 ran, 0 cached");
    assert_eq!(ran(&project), ["base", "final", "mix", "poems", "sft", "words"]);
    let begun = Instant::now();
    project.run().expect(0).prints("done: 0 ran, 6 cached");
    assert!(begun.elapsed().as_secs_f64() < 1.0, "took {:?}", begun.elapsed());
    assert_eq!(std::fs::read_dir(project.path("artifacts/runs")).unwrap().count(), 1, "no run was opened");
}

#[test]
fn a_changed_setting_reruns_its_node_and_what_follows() {
    let project = Project::new();
    project.run().expect(0);
    project.deepgen(&["run", "pipelines/small.toml", "--set", "sft.optimizer.lr=1e-4"]).expect(0);
    assert_eq!(ran(&project), ["final", "sft"]);
    project.run().expect(0).prints("0 ran, 6 cached");
}

#[test]
fn changed_content_of_an_input_file_reruns_its_readers() {
    let project = Project::new();
    project.run().expect(0);
    project.write("data/poems.txt", "a yellow cross\n");
    project.run().expect(0);
    assert_eq!(ran(&project), ["final", "mix", "poems", "sft"]);
}

#[test]
fn a_missing_input_file_starts_nothing_and_says_what_to_do() {
    let project = Project::new();
    std::fs::remove_file(project.path("data/poems.txt")).unwrap();
    project.run().expect(2).says("data/poems.txt").says("source.path");
    assert!(!project.path("artifacts/runs").exists());
}

#[test]
fn a_misspelt_key_starts_nothing() {
    let project = Project::new();
    project.edit(
        "pipelines/small.toml",
        r#"{ kind = "prompts", path = "../data/poems.txt" }"#,
        r#"{ kind = "prompts", pth = "../data/poems.txt" }"#,
    );
    project.run().expect(2).says("pth");
    assert!(!project.path("artifacts").exists());
}

#[test]
fn a_failed_node_blocks_its_descendants_and_the_next_run_repeats_only_these() {
    let project = Project::new();
    project.script(json!({ "sft": { "fail_at": 3, "fail_as": "input" } }));
    project.run().expect(1).says("told to fail at step 3").prints("1 failed, 1 left");
    assert_eq!(nodes_in(&project, "failed"), ["sft"]);
    assert_eq!(nodes_in(&project, "blocked"), ["final"]);
    project.script(json!({}));
    project.run().expect(0);
    assert_eq!(ran(&project), ["final", "sft"]);
}

#[test]
fn a_failure_that_may_pass_is_retried_from_the_newest_checkpoint() {
    let project = Project::new();
    project.edit("pipelines/small.toml", "[node.sft]", "[node.sft]\nretries = 1");
    project.script(json!({ "sft": { "steps": 8, "fail_at": 5, "fail_attempts": 1, "fail_as": "io" } }));
    project.run().expect(0).says("attempt 1 failed").says("sft: goes on from step 4");
    let manifest = &project.manifests()["sft"];
    assert_eq!(manifest["attempts"], 2);

    let undisturbed = Project::new();
    undisturbed.script(json!({ "sft": { "steps": 8 } }));
    undisturbed.run().expect(0);
    assert_eq!(project.results(), undisturbed.results());
}

#[test]
fn a_nan_is_retried_only_while_its_remedy_is_on() {
    for (remedy, attempts) in [("", 2), ("remedies = { non_finite = false }", 1)] {
        let project = Project::new();
        let keys = format!("[node.sft]\nretries = 1\n{remedy}");
        project.edit("pipelines/small.toml", "[node.sft]", &keys);
        project.script(json!({ "sft": { "fail_at": 3, "fail_as": "non_finite" } }));
        project.run().expect(1);
        assert_eq!(project.attempts()["sft"], attempts, "{remedy}");
    }
}

#[test]
fn manifests_name_settings_inputs_files_machine_and_worker() {
    let project = Project::new();
    project.run().expect(0);
    let manifests = project.manifests();
    let sft = &manifests["sft"];
    assert_eq!(sft["inputs"]["weights"], manifests["base"]["fingerprint"]);
    assert_eq!(sft["settings"]["settings"]["optimizer"]["lr"], 5e-5);
    assert_eq!(sft["seed"], 7);
    let files: Vec<_> = sft["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert_eq!(files, ["metrics.jsonl", "parts/result.txt"]);
    assert_eq!(sft["environment"]["worker_blake3"].as_str().unwrap().len(), 64);
    assert!(!sft["environment"]["host"].as_str().unwrap().is_empty());
    let sealed = format!("artifacts/store/{}/parts/result.txt", sft["fingerprint"].as_str().unwrap());
    assert!(std::fs::metadata(project.path(&sealed)).unwrap().permissions().readonly());
}

#[test]
fn json_progress_is_one_event_a_line_and_ends_with_the_summary() {
    let project = Project::new();
    let ran = project.deepgen(&["run", "pipelines/small.toml", "--json"]).expect(0);
    let lines: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["event"]["kind"], "run_started");
    assert!(lines.iter().any(|line| line["source"] == "worker" && line["event"]["kind"] == "progress"));
    assert_eq!(lines.last().unwrap()["summary"]["num_ran"], 6);
}

#[test]
fn quiet_tells_only_the_end() {
    let project = Project::new();
    let ran = project.deepgen(&["run", "pipelines/small.toml", "--quiet"]).expect(0);
    assert_eq!(ran.stderr, "");
    assert!(ran.stdout.starts_with("done: 6 ran"), "{}", ran.stdout);
}

#[test]
fn status_and_logs_work_while_a_run_goes_on() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 200, "step_ms": 20, "checkpoint_every": 5 } }));
    let running = project.start();
    project.wait_for_checkpoint("sft", 1, 5);
    project.deepgen(&["status"]).expect(0).prints("running").prints("/200");
    project.deepgen(&["logs", "sft"]).expect(0).prints("node sft attempt 1").prints("checkpoint at step 5");
    project.deepgen(&["runs"]).expect(0).prints("running");
    running.terminate().expect(1).says("sft: stopped");
    project.deepgen(&["logs", "stf"]).expect(2).says("did you mean `sft`?");
}

#[test]
fn an_orderly_stop_writes_a_checkpoint_and_the_same_command_goes_on_with_the_same_run() {
    let project = Project::new();
    project.script(json!({ "sft": { "steps": 200, "step_ms": 10, "checkpoint_every": 1000 } }));
    let running = project.start();
    project.wait_for_state("sft", "running");
    std::thread::sleep(std::time::Duration::from_millis(300));
    running.terminate().expect(1).prints("the same command goes on");
    assert_eq!(nodes_in(&project, "stopped"), ["sft"]);
    let run = project.status()["run"].clone();
    project.script(json!({ "sft": { "steps": 200 } }));
    project.run().expect(0).says("goes on with a run").says("sft: goes on from step");
    assert_eq!(project.status()["run"], run);
}

#[test]
fn a_second_orchestrator_is_told_who_works_here() {
    let project = Project::new();
    project.script(json!({ "words": { "steps": 100, "step_ms": 20 } }));
    let running = project.start();
    project.wait_for_state("words", "running");
    project.run().expect(4).says("is in use by process");
    project.write("pipelines/wrong.toml", "[pipline]\nname = \"wrong\"\n");
    project.deepgen(&["run", "pipelines/wrong.toml"]).expect(2).says("unknown key `pipline`");
    running.terminate().expect(1);
}

#[test]
fn a_missing_worker_is_named_before_anything_starts() {
    let project = Project::new();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_deepgen"))
        .args(["run", "pipelines/small.toml", "--worker", "no/such/worker"])
        .current_dir(project.path("."))
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("no worker at no/such/worker"));
}

#[test]
fn a_damaged_artifact_is_computed_again() {
    let project = Project::new();
    project.run().expect(0);
    let before = project.results();
    let base = project.manifests()["base"]["fingerprint"].as_str().unwrap().to_owned();
    std::fs::remove_file(project.path(&format!("artifacts/store/{base}/parts/result.txt"))).unwrap();
    project.run().expect(0);
    assert_eq!(ran(&project), ["base"]);
    std::fs::remove_dir_all(unverified(&project)).unwrap();
    assert_eq!(project.results(), before);
}

#[test]
fn a_sweep_runs_shared_nodes_once() {
    let project = Project::new();
    let ran_once = project.deepgen(&["sweep", "experiments/rates.toml"]).expect(0);
    assert!(ran_once.stdout.starts_with("done: 8 ran, 0 cached"), "{}", ran_once.stdout);
    assert_eq!(project.states().len(), 8, "four shared nodes, and two of each variant");
    project.run().expect(0).prints("0 ran, 6 cached");
}

#[test]
fn the_state_can_be_compared_with_the_journals_and_made_again() {
    let project = Project::new();
    project.run().expect(0);
    project.deepgen(&["state", "verify"]).expect(0).prints("agrees");
    std::fs::remove_dir_all(project.path("artifacts/state/db")).unwrap();
    project.deepgen(&["state", "verify"]).expect(1).prints("differs from its journal");
    project.deepgen(&["state", "rebuild"]).expect(0).prints("rebuilt the state of 1 runs");
    project.deepgen(&["state", "verify"]).expect(0).prints("agrees");
}

/// Returns the folder into which a damaged artifact was moved.
fn unverified(project: &Project) -> std::path::PathBuf {
    let mut entries = std::fs::read_dir(project.path("artifacts/store")).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.file_name().unwrap().to_string_lossy().starts_with("unverified-")).unwrap()
}

#[test]
fn bad_files_end_with_2_and_start_nothing() {
    let project = Project::new();
    let bad = std::path::absolute("tests/fixtures/bad").unwrap();
    let bad = |name: &str| bad.join(name).to_string_lossy().into_owned();
    project.deepgen(&["check", &bad("pipelines/many_at_once.toml")]).expect(2).says("unknown key `nam`").says("imprt");
    project.deepgen(&["check", &bad("stages/wrong_settings.toml"), &bad("pipelines/good.toml")]).expect(2);
    project.deepgen(&["check", &bad("pipelines/good.toml")]).expect(0).prints("no problems");
    project.deepgen(&["run", &bad("pipelines/unknown_setting.toml")]).expect(2).says("nothing was started");
    project.deepgen(&["sweep", &bad("experiments/no_variants.toml")]).expect(2);
    assert!(!project.path("artifacts").exists());
}

#[test]
fn a_variant_and_a_variable_of_the_environment_reach_the_jobs() {
    let project = Project::new();
    let more =
        "[variant.fast]\nset = { \"sft.optimizer.lr\" = 2e-4 }\n[env]\nDEEPGEN_TEST_DECAY = 0.05\n\n[node.words]";
    project.edit("pipelines/small.toml", "[node.words]", more);
    project.edit(
        "pipelines/small.toml",
        "[node.sft]",
        "[node.sft]\nset.optimizer.weight_decay = \"${env.DEEPGEN_TEST_DECAY}\"",
    );
    let plan = |arguments: &[&str]| {
        project.deepgen(&[&["explain", "sft", "pipelines/small.toml"], arguments].concat()).expect(0)
    };
    plan(&[]).prints("0.00005").prints("0.05");
    plan(&["--variant", "fast"]).prints("0.0002");
    project.deepgen(&["plan", "pipelines/small.toml", "--variant", "fats"]).expect(2).says("did you mean `fast`?");
}

#[test]
fn schemas_are_printed_and_shells_complete_the_names_of_nodes() {
    let project = Project::new();
    project.deepgen(&["schema", "stage", "train"]).expect(0).prints("optimizer");
    project.deepgen(&["schema", "stage", "trian"]).expect(2).says("did you mean `train`?");
    for shell in ["bash", "zsh", "fish"] {
        project.deepgen(&["completions", shell]).expect(0).prints("COMPLETE");
    }
    let complete = |words: &[&str]| {
        let index = (words.len() - 1).to_string();
        let asked = std::process::Command::new(env!("CARGO_BIN_EXE_deepgen"))
            .arg("--")
            .args(words)
            .envs([("COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", &index), ("_CLAP_COMPLETE_COMP_TYPE", "9")])
            .current_dir(project.path("."))
            .output()
            .unwrap();
        String::from_utf8(asked.stdout).unwrap()
    };
    let nodes = complete(&["deepgen", "run", "pipelines/small.toml", "--only", ""]);
    assert!(nodes.contains("poems") && nodes.contains("sft"), "{nodes}");
    assert!(complete(&["deepgen", "plan", "pipelines/small.toml", "--profile", "sm"]).contains("small"));
    assert!(complete(&["deepgen", "pl"]).contains("plan"));
}
