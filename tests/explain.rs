//! Stories about explaining, told with the real program and a fake worker: why a node runs, what it costs, what a
//! person accepts, how two runs differ.

mod harness;

use harness::Project;
use serde_json::Value;

const PIPELINE: &str = "pipelines/small.toml";
const LR: [&str; 2] = ["--set", "sft.optimizer.lr=1e-4"];

/// Returns `plan --json` under some changes.
fn plan(project: &Project, changes: &[&str]) -> Value {
    let ran = project.deepgen(&[&["plan", PIPELINE, "--json"], changes].concat()).expect(0);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

fn node<'a>(plan: &'a Value, name: &str) -> &'a Value {
    plan["nodes"].as_array().unwrap().iter().find(|node| node["node"] == name).unwrap()
}

#[test]
fn a_plan_says_what_changed_from_what_to_what_and_what_it_will_cost() {
    let project = Project::new();
    project.deepgen(&["plan", PIPELINE]).expect(0).prints("never ran").prints("expected cost: unknown");
    project.run().expect(0);
    project.write("data/poems.txt", "a yellow cross\n");
    let changes = ["--set", "sft.optimizer.lr=1e-4", "--set", "sft.optimizer.eps=1e-9"];
    let ran = project.deepgen(&[&["plan", PIPELINE, "-v"], &changes[..]].concat()).expect(0);
    let ran = ran.prints("content changed: data/poems.txt").prints("optimizer.eps: 1e-8 -> 1e-9 and 1 more setting");
    let ran = ran.prints("sft differs from its newest result in").prints("  optimizer.lr: 0.00005 -> 0.0001");
    ran.prints("  content source.path: ").prints("expected cost: ").prints(" of work, 0.00 GPU-hours, ");

    let plan = plan(&project, &changes);
    let sft = node(&plan, "sft");
    assert_eq!(sft["why"]["kind"], "setting");
    assert_eq!((&sft["why"]["old"], &sft["why"]["new"]), (&"1e-8".into(), &"1e-9".into()));
    assert_eq!(sft["differences"].as_array().unwrap().len(), 3, "two settings and an input: {sft}");
    assert!(sft["cost"]["seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(node(&plan, "words")["verdict"], "cached");
    assert_eq!(plan["cost"]["unknown"], serde_json::json!([]));
}

#[test]
fn gpu_hours_that_are_too_many_or_unknown_start_nothing() {
    let project = Project::new();
    project.edit(PIPELINE, "device = \"cpu\"", "device = \"cuda\"");
    let guard = ["--max-gpu-hours", "5"];
    project.deepgen(&[&["run", PIPELINE], &guard[..]].concat()).expect(2).says("no earlier run tells").says("sft");
    assert!(!project.path("artifacts/runs").exists());
    project.run().expect(0);
    project.deepgen(&[&["plan", PIPELINE], &guard[..]].concat()).expect(0).prints("6 cached");
    project.deepgen(&[&["run", PIPELINE], &LR[..], &guard[..]].concat()).expect(0);
    // The same iterations a million times over, in hours.
    let long = ["--set", "sft.train.max_iters=400_000_000_000_000"];
    project.deepgen(&[&["plan", PIPELINE], &long[..], &guard[..]].concat()).expect(2).says("GPU-hours are expected");
    project.deepgen(&[&["run", PIPELINE], &long[..], &guard[..]].concat()).expect(2).says("nothing was started");
}

#[test]
fn an_accepted_change_reruns_nothing_and_can_be_taken_back() {
    let project = Project::new();
    project.deepgen(&["accept", "sft", PIPELINE]).expect(2).says("it never ran");
    project.run().expect(0);
    let results = project.results();
    project.deepgen(&["accept", "sft", PIPELINE]).expect(0).prints("nothing to accept");
    project.deepgen(&["accept", "sfd", PIPELINE]).expect(2).says("did you mean `sft`?");

    let accept = [&["accept", "sft", PIPELINE, "--note", "only a spelling"], &LR[..]].concat();
    project.deepgen(&accept).expect(0).prints("optimizer.lr: 0.00005 -> 0.0001");
    let plan_text = project.deepgen(&[&["plan", PIPELINE], &LR[..]].concat()).expect(0).prints("6 cached, 0 to run");
    plan_text.prints("accepted in place of");
    let explained = project.deepgen(&[&["explain", "sft", PIPELINE], &LR[..]].concat()).expect(0);
    explained.prints("accepted by ").prints("only a spelling").prints("optimizer.lr: 0.00005 -> 0.0001");
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("0 ran, 6 cached");
    assert_eq!(project.results(), results, "nothing was copied or made");
    // What follows is made from the accepted result, as before.
    let changed = [&["run", PIPELINE, "--set", "final.dtype=f32"], &LR[..]].concat();
    project.deepgen(&changed).expect(0).prints("1 ran, 5 cached");

    project.deepgen(&["accept", "--list"]).expect(0).prints("sft").prints("only a spelling");
    project.deepgen(&[&["accept", "sft", PIPELINE, "--revoke"], &LR[..]].concat()).expect(0).prints("no longer");
    project.deepgen(&["accept", "--list"]).expect(0).prints("taken back by");
    let again = project.deepgen(&[&["plan", PIPELINE], &LR[..]].concat()).expect(0);
    again.prints("optimizer.lr: 0.00005 -> 0.0001");
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("2 ran, 4 cached");
    let revoke_nothing = ["accept", "sft", PIPELINE, "--revoke"];
    project.deepgen(&revoke_nothing).expect(2).says("nothing was accepted");
}

#[test]
fn an_accepted_result_that_is_gone_is_made_again() {
    let project = Project::new();
    project.run().expect(0);
    project.deepgen(&[&["accept", "sft", PIPELINE], &LR[..]].concat()).expect(0);
    let fingerprint = project.manifests()["sft"]["fingerprint"].as_str().unwrap().to_owned();
    std::fs::remove_dir_all(project.path("artifacts/store").join(fingerprint)).unwrap();
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0).prints("2 ran, 4 cached");
}

#[test]
fn a_smoke_test_has_results_of_its_own_which_stand_for_no_real_ones() {
    let project = Project::new();
    project.deepgen(&["run", PIPELINE, "--smoke"]).expect(0).prints("6 ran");
    let explained = project.deepgen(&["explain", "sft", PIPELINE, "--smoke"]).expect(0).prints("cached");
    let line = explained.stdout.lines().find(|line| line.trim_start().starts_with("train.max_iters")).unwrap();
    assert!(line.contains(" 2 ") && line.ends_with("--smoke"), "{line}");
    project.deepgen(&["accept", "sft", PIPELINE]).expect(2).says("of a smoke test");
    project.run().expect(0).prints("3 ran, 3 cached");
    project.deepgen(&["run", PIPELINE, "--smoke"]).expect(0).prints("0 ran, 6 cached");
    // What is real is compared with what is real, however new the smoke test.
    let plan = plan(&project, &["--set", "sft.optimizer.lr=1e-4"]);
    assert_eq!(node(&plan, "sft")["differences"].as_array().unwrap().len(), 1);
}

/// Returns the names of all runs, oldest first.
fn runs(project: &Project) -> Vec<String> {
    let folder = std::fs::read_dir(project.path("artifacts/runs")).unwrap();
    let mut names: Vec<String> = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn two_runs_are_compared_down_to_the_setting() {
    let project = Project::new();
    project.run().expect(0);
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0);
    let names = runs(&project);
    let text = project.deepgen(&["diff", &names[0], &names[1]]).expect(0);
    let text = text.prints("4 the same, 2 differ").prints("optimizer.lr: 0.00005 -> 0.0001");
    text.prints("1 node by their inputs alone: final").prints("environment: the same").prints("command: run");
    let json = project.deepgen(&["diff", &names[0], &names[1], "--json"]).expect(0);
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["diff"]["changed"][0]["differences"][0]["key"], "optimizer.lr");
    assert_eq!(json["diff"]["changed"][1]["is_consequence"], true);

    let nodes = [format!("{}:words", names[0]), format!("{}:poems", names[0])];
    project.deepgen(&["diff", &nodes[0], &nodes[1]]).expect(0).prints("source.path: \"data/words.txt\" -> ");
    let results: Vec<String> =
        project.manifests().values().map(|made| made["fingerprint"].as_str().unwrap()[..16].to_owned()).collect();
    project.deepgen(&["diff", &results[0], &results[1]]).expect(0).prints("identity");
    project.deepgen(&["diff", &names[0], &nodes[1]]).expect(2).says("a run is compared with a run");
    project.deepgen(&["diff", &names[0], &format!("{}:wrods", names[0])]).expect(2).says("did you mean `words`?");
    project.deepgen(&["diff", &names[0], "000000000000"]).expect(2).says("no sealed result");
}

#[test]
fn a_run_says_how_to_make_it_again_and_what_is_different_now() {
    let project = Project::new();
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0);
    let text = project.deepgen(&["reproduce"]).expect(0).prints("deepgen run pipelines/small.toml --set");
    let text = text.prints("environment: the same").prints("files of the project: the same");
    text.prints("all 6 would give the same results");
    project.edit(PIPELINE, "seed = 7", "seed = 8");
    let text = project.deepgen(&["reproduce"]).expect(0).prints("  pipelines/small.toml: ");
    text.prints("6 of 6 are other ones now").prints("seed: 7 -> 8");
    let json = project.deepgen(&["reproduce", "--json"]).expect(0);
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["num_nodes"], 6);
    assert!(json["command"].as_str().unwrap().contains("--set sft.optimizer.lr=1e-4"));
}

#[test]
fn uncommitted_changes_are_kept_once_beside_the_run() {
    let project = Project::new();
    let git = |arguments: &[&str]| {
        let who = ["-c", "user.name=a", "-c", "user.email=a@b"];
        let run = std::process::Command::new("git").args(who).args(arguments).current_dir(project.path("")).output();
        assert!(run.unwrap().status.success(), "git {arguments:?}");
    };
    project.write(".gitignore", "artifacts\n");
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "first"]);
    project.edit(PIPELINE, "seed = 7", "seed = 8");
    project.run().expect(0);
    let manifest = &project.manifests()["sft"];
    let hash = manifest["environment"]["git_diff_blake3"].as_str().unwrap();
    let run = &runs(&project)[0];
    let patch = project.path(&format!("artifacts/runs/{run}/changes-{}.diff", &hash[..12]));
    assert!(std::fs::read_to_string(&patch).unwrap().contains("+seed = 8"));
    project.deepgen(&["reproduce"]).expect(0).prints("git checkout ").prints("git apply ").prints("changes-");
}

#[test]
fn a_graph_comes_in_three_forms() {
    let project = Project::new();
    project.deepgen(&["graph", PIPELINE]).expect(0).prints("flowchart LR").prints("n4[\"sft\"]:::run");
    project.deepgen(&["graph", PIPELINE, "--format", "dot"]).expect(0).prints("digraph").prints("-> n");
    project.run().expect(0);
    project.deepgen(&["graph", PIPELINE, "--out", "graph.svg"]).expect(0).prints("graph.svg");
    let svg = std::fs::read_to_string(project.path("graph.svg")).unwrap();
    assert_eq!(svg.matches("class=\"node cached\"").count(), 6);
}

/// Unpacks an archive and returns the folder that it holds.
fn unpack(archive: &std::path::Path, into: &std::path::Path) -> std::path::PathBuf {
    let file = std::fs::File::open(archive).unwrap();
    tar::Archive::new(flate2::read::GzDecoder::new(file)).unpack(into).unwrap();
    std::fs::read_dir(into).unwrap().next().unwrap().unwrap().path()
}

#[test]
fn a_frozen_run_unpacks_into_a_project_that_can_be_planned() {
    let project = Project::new();
    project.deepgen(&[&["run", PIPELINE], &LR[..]].concat()).expect(0);
    // What the run was planned from is kept, not what lies there now.
    project.edit(PIPELINE, "seed = 7", "seed = 8");
    project.deepgen(&["freeze", "--out", "small.tar.gz"]).expect(0).prints("small.tar.gz");
    project.deepgen(&["freeze", "--out", "whole.tar.gz", "--with-weights"]).expect(0);
    project.deepgen(&["freeze", "--out", "whole.zip"]).expect(2).says(".tar.gz");
    let dir = tempfile::tempdir().unwrap();
    let plan_in = |folder: &std::path::Path| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_deepgen"));
        let output = command.args(["plan", PIPELINE]).args(LR).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let small = unpack(&project.path("small.tar.gz"), &dir.path().join("small"));
    assert!(plan_in(&small).contains("6 nodes: 0 cached, 6 to run"));
    let readme = std::fs::read_to_string(small.join("README.md")).unwrap();
    assert!(readme.contains("deepgen run pipelines/small.toml --set sft.optimizer.lr=1e-4"), "{readme}");
    assert!(small.join("manifests/sft.json").is_file());
    for file in ["plan.json", "resolved.toml", "journal.jsonl", "report.html", "environment.json"] {
        assert!(small.join("artifacts/runs").join(&runs(&project)[0]).join(file).is_file(), "{file}");
    }
    let whole = unpack(&project.path("whole.tar.gz"), &dir.path().join("whole"));
    assert!(plan_in(&whole).contains("6 nodes: 6 cached, 0 to run"));
}
