//! A judge behind an OpenAI-compatible chat server, such as vLLM.
//!
//! Knows the request, the answer and when to try again (docs/spec/rewards.md section 2); knows neither rubric nor
//! score. Images go first, text last.

use std::io::Cursor;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use deepgen_contract::eval::JudgeSettings;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use serde_json::{Value, json};

use crate::judge::{Answer, Judge, JudgeError, Question};

const JPEG_QUALITY: u8 = 95;
const LONGEST_PAUSE_UNITS: f64 = 10.0;

/// A chat server and how it is asked.
#[derive(Debug, Clone)]
pub struct HttpJudge {
    /// Base address, with scheme and without a slash at the end.
    url: String,
    model: String,
    temperature: f64,
    max_tokens: usize,
    attempts: u32,
    /// The unit in which pauses are counted: a second, less in tests.
    pause: Duration,
    agent: ureq::Agent,
}

impl HttpJudge {
    /// Returns a judge for settings of kind `http`, and nothing for the others.
    pub fn from_settings(settings: &JudgeSettings) -> Option<Self> {
        let JudgeSettings::Http { url, model, temperature, max_tokens, attempts, .. } = settings else { return None };
        // Status codes are looked at below: a server's refusal carries a reason in its body.
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        Some(Self {
            url: base_url(url),
            model: model.clone(),
            temperature: *temperature,
            max_tokens: *max_tokens,
            attempts: (*attempts).max(1),
            pause: Duration::from_secs(1),
            agent,
        })
    }

    fn body(&self, question: &Question) -> Result<Value, JudgeError> {
        let mut content = Vec::new();
        for image in &question.images {
            let url = format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg(image, JPEG_QUALITY)?));
            content.push(json!({"type": "image_url", "image_url": {"url": url}}));
        }
        content.push(json!({"type": "text", "text": question.text}));
        let mut messages = Vec::new();
        if !question.system.is_empty() {
            messages.push(json!({"role": "system", "content": question.system}));
        }
        messages.push(json!({"role": "user", "content": content}));
        Ok(json!({
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }))
    }

    fn post(&self, body: &Value, attempt: u32) -> Result<String, Failure> {
        let request = self.agent.post(format!("{}/v1/chat/completions", self.url));
        let request = request.config().timeout_global(Some(read_timeout(attempt))).build();
        let mut response = request.send_json(body).map_err(|error| Failure::again(error.to_string()))?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(|error| Failure::again(error.to_string()))?;
        if status != 200 {
            let reason = format!("status {status}: {}", text.chars().take(200).collect::<String>());
            return Err(Failure { reason, is_retryable: matches!(status, 429 | 500 | 502 | 503 | 504) });
        }
        let answer: Value = serde_json::from_str(&text).map_err(|error| Failure::again(error.to_string()))?;
        let content = answer.pointer("/choices/0/message/content").and_then(Value::as_str);
        content.map(str::to_owned).ok_or_else(|| Failure::again("the answer has no message content".into()))
    }
}

struct Failure {
    reason: String,
    is_retryable: bool,
}

impl Failure {
    fn again(reason: String) -> Self {
        Self { reason, is_retryable: true }
    }
}

impl Judge for HttpJudge {
    fn identity(&self) -> String {
        // The address is left out: the same model behind another address gives the same answers.
        format!("http {} temperature {} max_tokens {}", self.model, self.temperature, self.max_tokens)
    }

    fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
        let body = self.body(question)?;
        let mut attempt = 1;
        loop {
            match self.post(&body, attempt) {
                Ok(text) => return Ok(Answer::Text(text)),
                Err(failure) if !failure.is_retryable || attempt >= self.attempts => {
                    return Err(JudgeError::NoAnswer {
                        url: self.url.clone(),
                        attempts: attempt,
                        last: failure.reason,
                    });
                }
                Err(_) => std::thread::sleep(self.pause.mul_f64(pause_units(attempt, jitter()))),
            }
            attempt += 1;
        }
    }
}

/// Returns `url` with a scheme and without a slash at the end.
fn base_url(url: &str) -> String {
    let url = url.trim_end_matches('/');
    if url.contains("://") { url.to_owned() } else { format!("http://{url}") }
}

/// Returns the time limit of an attempt, counted from 1.
fn read_timeout(attempt: u32) -> Duration {
    Duration::from_secs(160 + 5 * u64::from(attempt))
}

/// Returns the pause after a failed attempt, in units: `min(2^attempt + jitter, 10)`.
fn pause_units(attempt: u32, jitter: f64) -> f64 {
    (2f64.powi(attempt.min(16) as i32) + jitter).min(LONGEST_PAUSE_UNITS)
}

/// Returns a number in [0, 1) that spreads the retries of many workers; nothing depends on which.
fn jitter() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.subsec_nanos());
    f64::from(now % 1000) / 1000.0
}

/// Returns `image` as JPEG.
///
/// # Errors
/// When the encoder fails, as it does for an empty image.
pub fn jpeg(image: &RgbImage, quality: u8) -> Result<Vec<u8>, image::ImageError> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, quality))?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::thread::JoinHandle;

    use image::Rgb;

    use super::*;

    /// A server that answers one request with each of `replies`, and returns the bodies it was sent.
    fn serve(replies: Vec<(u16, &'static str)>) -> (String, JoinHandle<Vec<Value>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let mut bodies = Vec::new();
            for (status, reply) in replies {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut length = 0;
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                assert!(line.starts_with("POST /v1/chat/completions "), "{line}");
                while line.trim() != "" {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                bodies.push(serde_json::from_slice(&body).unwrap());
                let head =
                    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", reply.len());
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(reply.as_bytes()).unwrap();
            }
            bodies
        });
        (address, server)
    }

    fn judge(url: &str, attempts: u32) -> HttpJudge {
        let settings = JudgeSettings::Http {
            url: url.into(),
            model: "UnifiedReward".into(),
            temperature: 0.0,
            max_tokens: 4096,
            workers: 1,
            attempts,
        };
        HttpJudge { pause: Duration::from_millis(1), ..HttpJudge::from_settings(&settings).unwrap() }
    }

    fn question(system: &str) -> Question {
        let image = |level| Arc::new(RgbImage::from_pixel(8, 8, Rgb([level; 3])));
        Question {
            system: system.into(),
            text: "Which image is better?".into(),
            images: vec![image(10), image(200)],
            expectation: None,
        }
    }

    const GOOD: &str = r#"{"choices":[{"message":{"content":"<answer>Image 1 is better</answer>"}}]}"#;

    #[test]
    fn a_busy_server_is_asked_again_with_the_documented_body() {
        let (url, server) = serve(vec![(503, "busy"), (200, "{\"choices\":[]}"), (200, GOOD)]);
        let answer = judge(&url, 5).ask(&question("be strict")).unwrap();
        assert_eq!(answer, Answer::Text("<answer>Image 1 is better</answer>".into()));
        let bodies = server.join().unwrap();
        assert_eq!(bodies.len(), 3);
        assert_eq!(bodies[0], bodies[2]);
        let body = &bodies[0];
        assert_eq!(body["model"], "UnifiedReward");
        assert_eq!((body["temperature"].as_f64(), body["max_tokens"].as_u64()), (Some(0.0), Some(4096)));
        assert_eq!(body["messages"][0], json!({"role": "system", "content": "be strict"}));
        let content = body["messages"][1]["content"].as_array().unwrap();
        assert_eq!(content.len(), 3);
        let url = content[1]["image_url"]["url"].as_str().unwrap();
        let bytes = STANDARD.decode(url.strip_prefix("data:image/jpeg;base64,").unwrap()).unwrap();
        assert_eq!(image::load_from_memory(&bytes).unwrap().to_rgb8().get_pixel(3, 3).0, [200; 3]);
        assert_eq!(content[2], json!({"type": "text", "text": "Which image is better?"}));
    }

    #[test]
    fn without_a_system_line_there_is_one_message() {
        let body = judge("h", 1).body(&question("")).unwrap();
        assert_eq!(body["messages"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_refusal_is_final_and_attempts_run_out() {
        let (url, server) = serve(vec![(400, "no such model")]);
        let error = judge(&url, 5).ask(&question("")).unwrap_err().to_string();
        assert!(error.contains("1 attempts") && error.contains("no such model"), "{error}");
        server.join().unwrap();
        let (url, server) = serve(vec![(500, "a"), (500, "b")]);
        let error = judge(&url, 2).ask(&question("")).unwrap_err().to_string();
        assert!(error.contains("2 attempts") && error.contains("status 500: b"), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn addresses_limits_and_pauses_follow_the_release() {
        assert_eq!(base_url("host:18087/"), "http://host:18087");
        assert_eq!(base_url("https://h"), "https://h");
        assert_eq!(read_timeout(1), Duration::from_secs(165));
        assert_eq!((pause_units(1, 0.5), pause_units(3, 0.5), pause_units(4, 0.5)), (2.5, 8.5, 10.0));
    }
}
