// What makes a component of gradio of the editor: it does what its value says, and its events tell what was pointed at.
const editor = createEditor(element, {
  onNote: (text) => {
    const status = document.querySelector("#status [role=status]");
    if (status) status.textContent = text;
  },
  onSelect: (request) => trigger("select", request),
});
const follow = () => editor[props.value?.do]?.(props.value);
watch("value", follow);
follow();
window.moebiusEditor = editor;
