"""Fields of a request for an answer, beyond those that the server computes with (api.py).

ONLY and IN_A_MESSAGE: OpenAI's, then those of other servers, that would change the answer, with the
values that change nothing (null is always one of them); another value is refused by name.
"""

ONLY: dict[str, tuple] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "typical_p": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "ignore_eos": (False,),
    "echo": (False,),
    "suffix": ("",),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "logits_processors": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "json_schema": (),
    "grammar": ("",),
    "regex": (),
    "ebnf": (),
    "no_repeat_ngram_size": (0,),
    "mirostat": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "do_sample": (),
    "options": ({},),
    "prompt": (),
    "system": ("",),
    "thinking": (),
    "enable_thinking": (),
    "max_new_tokens": (),
    "num_predict": (),
    "repeat_penalty": (1,),
}
# what does here what such a field does elsewhere
INSTEAD = {
    "do_sample": "temperature 0 is greedy",
    "system": 'a message of role "system" says it',
    "thinking": "chat_template_kwargs reaches the template",
    "enable_thinking": "chat_template_kwargs reaches the template",
    "max_new_tokens": "max_tokens is the limit",
    "num_predict": "max_tokens is the limit",
    "repeat_penalty": "repetition_penalty is its name here",
}
# the same in a message
IN_A_MESSAGE: dict[str, tuple] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "images": ([],),
    "prefix": (False,),
}
# that change no answer
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls")
HARMLESS += ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_prompt")
# no variables of a template: the server sets them
NO_VARIABLES = ("tokenizer", "messages", "tools", "documents", "conversations", "chat_template")
NO_VARIABLES += ("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask")
